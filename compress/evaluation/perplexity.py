"""Perplexity on fixed windows of a text.

The protocol of the published tables: the whole text is tokenized once without special tokens and cut into
non-overlapping full windows of T tokens; each window gives T - 1 predictions; perplexity = exp(mean negative
log-likelihood, in nats). Logits come from the model's own forward; the softmax is float32 whatever the model's dtype,
over a few positions at a time, so a large vocabulary costs no second copy of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from compress.errors import CompressError
from compress.products import faster

CHUNK_ELEMENTS = 1 << 23  # logits per float32 softmax chunk: 32 MiB
Progress = Callable[[int, int], None]  # called with (windows done, windows in all)


def windows(text: str, tokenizer: Any, seqlen: int, limit: int | None = None) -> torch.Tensor:
    """Tokenize `text` and cut it into full windows `[N, seqlen]` int64; `limit` keeps the first ones.

    The tail that does not fill a window is dropped. A text shorter than one window is an error.
    """
    if seqlen < 2:
        raise CompressError(f"seqlen {seqlen}: a window needs at least 2 tokens", hint="try 512", usage=True)
    if limit is not None and limit < 1:
        raise CompressError(f"windows {limit}: at least 1 is needed", usage=True)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    count = ids.numel() // seqlen
    if count == 0:
        hint = f"give a longer text, or a seqlen of at most {ids.numel()}" if ids.numel() > 1 else "give a longer text"
        raise CompressError(f"the text has {ids.numel()} tokens, one window needs {seqlen}", hint=hint)
    return ids[: count * seqlen].view(count, seqlen)[:limit]


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Inference mode and eval mode for a while; each model's training flag is put back."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode(), faster():
            yield
    finally:
        for model, flag in zip(models, training, strict=True):
            model.train(flag)


def predictions(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[B * (T - 1), V]` for every token of `ids` `[B, T]` but the first, in the model's own dtype."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]
    return logits.reshape(-1, logits.shape[-1])


def chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of positions small enough for a float32 softmax."""
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + step) for start in range(0, rows, step))


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood `[N]` of `targets` `[N]` under `logits` `[N, V]`, float32, on the CPU."""
    targets = targets.to(logits.device)
    parts = [F.cross_entropy(logits[s].float(), targets[s], reduction="none") for s in chunks(*logits.shape)]
    return torch.cat(parts).cpu()


def window_means(values: torch.Tensor, batch: int, first: int, what: str) -> list[float]:
    """Mean over the positions of each window, in float64; NaN or Inf stops with the number of the window."""
    means: list[float] = values.double().view(batch, -1).mean(1).tolist()
    for offset, mean in enumerate(means):
        if not math.isfinite(mean):
            raise CompressError(
                f"evaluation window {first + offset}: the {what} is {mean}",
                hint="the model's logits overflow or hold NaN: evaluate in float32, and check the artifact with compress verify",
            )
    return means


def exp_mean(nll: list[float]) -> float:
    """exp of the mean of `nll`; a loss too large to have a perplexity is an error."""
    mean = math.fsum(nll) / len(nll)
    if mean > 700:
        raise CompressError(f"mean loss {mean:.4g} nats: the perplexity overflows", hint="the model is broken: compress verify")
    return math.exp(mean)


def perplexity(
    model: Any, windows: torch.Tensor, batch_size: int = 1, progress: Progress | None = None
) -> tuple[float, float, list[float]]:
    """Perplexity of `model` on `windows` `[N, T]`: (perplexity, mean NLL in nats, mean NLL of each window)."""
    per_window: list[float] = []
    with evaluating(model):
        for ids in windows.split(batch_size):
            nll = losses(predictions(model, ids), ids[:, 1:].reshape(-1))
            per_window += window_means(nll, len(ids), len(per_window), "loss")
            if progress:
                progress(len(per_window), len(windows))
    return exp_mean(per_window), math.fsum(per_window) / len(per_window), per_window

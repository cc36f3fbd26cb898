"""How far a model's predictions moved from its baseline's: KL(baseline ‖ model) and top-1 agreement.

KL(p ‖ q) = Σ_v p_v (log p_v - log q_v), in nats, averaged over the T - 1 predictions of every window. It sees what
perplexity averages away. Windows are the unit of sampling (tokens of one window are correlated), so standard errors are
taken over windows. Both models run once per window; their losses come from the same pass.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from compress.errors import CompressError
from compress.evaluation.perplexity import Progress, chunks, evaluating, losses, predictions, window_means


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; no error for a single value."""
    mean = math.fsum(values) / len(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True, slots=True)
class Divergence:
    """Per-window means of one paired run; every list has one entry per window."""

    kl: list[float]
    agreement: list[float]  # share of positions where both models rank the same token first
    baseline_nll: list[float]
    model_nll: list[float]


def compare(baseline: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(baseline ‖ model) `[N]` float32 and top-1 agreement `[N]` float32 of two logits `[N, V]`, on the CPU."""
    kl, same = [], []
    for s in chunks(*logits.shape):
        p, q = baseline[s].to(logits.device).float(), logits[s].float()
        same.append((p.argmax(-1) == q.argmax(-1)).float())
        p, q = F.log_softmax(p, -1), F.log_softmax(q, -1)
        kl.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kl).cpu(), torch.cat(same).cpu()


def divergence(
    baseline: Any, model: Any, windows: torch.Tensor, batch_size: int = 1, progress: Progress | None = None
) -> Divergence:
    """Run both models over `windows` `[N, T]` and compare their predictions position by position."""
    result = Divergence([], [], [], [])
    with evaluating(baseline, model):
        for ids in windows.split(batch_size):
            targets, batch, first = ids[:, 1:].reshape(-1), len(ids), len(result.kl)
            p, q = predictions(baseline, ids), predictions(model, ids)
            if p.shape != q.shape:
                raise CompressError(
                    f"the baseline predicts {p.shape[-1]} tokens, the model {q.shape[-1]}: they cannot be compared",
                    hint="give the checkpoint that this model was made from as --baseline",
                )
            result.baseline_nll.extend(window_means(losses(p, targets), batch, first, "baseline's loss"))
            result.model_nll.extend(window_means(losses(q, targets), batch, first, "loss"))
            kl, same = compare(p, q)
            result.kl.extend(window_means(kl, batch, first, "KL divergence"))
            result.agreement.extend(window_means(same, batch, first, "agreement"))
            if progress:
                progress(len(result.kl), len(windows))
    return result

"""What a compressed model lost: perplexity, KL against the base, lm-eval tasks. Importing this imports no torch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.evaluation.report import EvalReport, Metric, Score, task_metrics

__all__ = ["EvalReport", "Metric", "Score", "evaluate"]

REPORT = "report.json"
_log = logging.getLogger(__name__)
_DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}


def evaluate(
    model: Any,
    *,
    baseline: Any = None,
    text: str | Path | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    tasks: str | Sequence[str] = (),
    limit: int | float | None = None,
    task_dir: str | Path | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: Any = None,
    fast: bool = False,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalReport:
    """Measure a model, beside its baseline where one is given.

    `model` and `baseline`: a folder, a hub id, or a PreTrainedModel (measured where and as it is; give `tokenizer`).
    `text`: a .txt file for perplexity and, with a baseline, KL and top-1 agreement, on its first `windows` windows of
    `seqlen` tokens (default min(512, the model's context)). `tasks`: names of lm-eval tasks, or one string with commas.
    `dtype` None means float32 on the CPU, the checkpoint's own elsewhere; `fast` allows kernels that round differently.

    Model and baseline are in memory together: each window runs through both, and no logits are stored. Where they do
    not fit side by side, evaluate them one after the other. The report of an artifact folder is written into it.
    """
    names = [t.strip() for t in tasks.split(",") if t.strip()] if isinstance(tasks, str) else list(tasks)
    if text is None and not names:
        raise CompressError("nothing to evaluate", hint="give --text FILE, --tasks NAMES, or both", usage=True)
    if batch_size < 1:
        raise CompressError(f"batch size {batch_size}: at least 1 is needed", usage=True)
    content = _read(Path(text)) if text is not None else None

    place, precision = _place(device, dtype, model, baseline)
    subject = _open(model, place, precision, fast)
    tokenizer = _tokenizer(tokenizer, model, baseline)
    base = None if baseline is None else _open(baseline, place, precision, fast)

    numbers = str(subject.dtype).removeprefix("torch.")
    settings: dict[str, Any] = {"device": subject.device.type, "dtype": numbers, "fast": fast}
    ids, metrics = None, list[Metric]()
    if text is not None and content is not None:
        from compress.evaluation.perplexity import windows as cut

        seqlen = _seqlen(seqlen, subject)
        ids = cut(content, tokenizer, seqlen, windows)
        digest = hashlib.sha256(content.encode()).hexdigest()
        settings |= {"text": Path(text).name, "text_sha256": digest, "seqlen": seqlen, "windows": len(ids)}
    if names:  # before the text: a wrong name or missing data shows at once
        options: dict[str, Any] = {"limit": limit, "task_dir": task_dir, "batch_size": batch_size}
        metrics = _task_rows(subject, base, tokenizer, names, options)
        settings |= {"tasks": names, "limit": limit}
    if ids is not None:
        metrics = _text_rows(subject, base, ids, batch_size, progress) + metrics

    report = EvalReport(_name(model), None if base is None else _name(baseline), settings, tuple(metrics))
    _store(report, model)
    return report


def _task_rows(model: Any, base: Any, tokenizer: Any, names: list[str], options: dict[str, Any]) -> list[Metric]:
    from compress.evaluation.tasks import run_tasks

    found = run_tasks(model, tokenizer, names, **options)
    return task_metrics(found, None if base is None else run_tasks(base, tokenizer, names, **options))


def _text_rows(model: Any, base: Any, ids: Any, batch_size: int, progress: Any) -> list[Metric]:
    """Rows of the text: perplexity, and beside a baseline also KL and agreement. Errors are over windows."""
    from compress.evaluation.divergence import divergence, mean_stderr
    from compress.evaluation.perplexity import exp_mean, perplexity

    count = len(ids)
    if base is None:
        ppl, _, nll = perplexity(model, ids, batch_size, progress)
        error = mean_stderr([ppl * x for x in nll])[1]
        return [Metric("perplexity", ppl, error, higher_is_better=False, samples=count)]
    run = divergence(base, model, ids, batch_size, progress)
    ppl, base_ppl = exp_mean(run.model_nll), exp_mean(run.baseline_nll)
    # delta method, d(ppl) = ppl d(nll); the difference is paired by window, since both read the same text
    ours, theirs = [ppl * x for x in run.model_nll], [base_ppl * x for x in run.baseline_nll]
    paired = [c - b for c, b in zip(ours, theirs, strict=True)]
    (_, error), (_, base_error), (_, change_error) = map(mean_stderr, (ours, theirs, paired))
    return [
        Metric("perplexity", ppl, error, base_ppl, base_error, ppl - base_ppl, change_error, False, False, count),
        Metric("KL", *mean_stderr(run.kl), higher_is_better=False, samples=count),
        Metric("top-1 agreement", *mean_stderr(run.agreement), samples=count),
    ]


def _is_path(model: Any) -> bool:
    return isinstance(model, str | Path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompressError(
            f"{path}: cannot be read as UTF-8 text ({error})", hint="--text takes a plain text file", usage=True
        ) from error


def _place(device: str, dtype: Any, *models: Any) -> tuple[str, Any]:
    """Where and in which dtype to load: as asked; else as the model in memory; else the best device, fp32 on a CPU."""
    import torch

    from compress import devices

    if isinstance(dtype, str):
        known = getattr(torch, _DTYPES.get(dtype, dtype), None)
        if not isinstance(known, torch.dtype):
            raise CompressError(f"{dtype}: no such dtype", hint="use float32, float16 or bfloat16", usage=True)
        dtype = known
    live = next((m for m in models if m is not None and not _is_path(m)), None)
    device = str(live.device) if device == "auto" and live is not None else devices.pick(device)
    if dtype is None and live is not None:
        dtype = live.dtype
    return device, torch.float32 if dtype is None and torch.device(device).type == "cpu" else dtype


def _open(model: Any, device: str, dtype: Any, fast: bool) -> Any:
    if not _is_path(model):
        return model
    from compress.loading import load

    return load(model, device=device, dtype=dtype, exact=not fast)


def _tokenizer(tokenizer: Any, *models: Any) -> Any:
    """The given tokenizer, or that of the first model that is a folder or hub id."""
    if tokenizer is not None and not _is_path(tokenizer):
        return tokenizer
    source = tokenizer or next((m for m in models if m is not None and _is_path(m)), None)
    if source is None:
        raise CompressError("a model in memory needs its tokenizer", hint="pass tokenizer=…", usage=True)
    from transformers import AutoTokenizer

    from compress.checkpoint.source import resolve

    try:
        return AutoTokenizer.from_pretrained(str(resolve(source)))
    except (OSError, ValueError) as error:
        raise CompressError(
            f"{source}: no tokenizer could be loaded from it ({error})", hint="copy the tokenizer files into the folder"
        ) from error


def _seqlen(seqlen: int | None, model: Any) -> int:
    """The window length: as given if the model's context allows it, else min(512, context)."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if seqlen is None:
        seqlen = min(512, context or 512)
        _log.info("windows of %d tokens (--seqlen to change)", seqlen)
    elif context and seqlen > context:
        raise CompressError(f"seqlen {seqlen}: the model's context is {context}", hint=f"use --seqlen {context}", usage=True)
    return seqlen


def _name(model: Any) -> str:
    """A name without machine paths: the folder's own name, the hub id, or the class of a model in memory."""
    if not _is_path(model):
        return type(model).__name__
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else str(model)


def _store(report: EvalReport, model: Any) -> None:
    """Write `report.json` into an artifact folder; a folder that cannot be written must not cost the evaluation."""
    from compress.checkpoint.manifest import FILE
    from compress.checkpoint.writer import write_file

    if not _is_path(model):
        return
    folder = Path(model).expanduser()
    if not (folder / FILE).is_file():
        return
    try:
        write_file(folder / REPORT, report.to_json().encode())
    except CompressError as error:
        _log.warning("%s; the report is not stored", error.message)

"""Measuring the tasks of a bundle: one model, switched from task to task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.evaluation.report import EvalReport


def _files(text: str | Path | Mapping[str, str | Path] | None, names: list[str]) -> dict[str, str | Path | None]:
    """The text of each task: one for all, or one each."""
    if not isinstance(text, Mapping):
        return dict.fromkeys(names, text)
    for name in names:
        if name not in text:
            raise CompressError(f"no text for task {name}", hint=f"--text {name}=FILE for each, or one --text FILE", usage=True)
    return {name: text[name] for name in names}


def evaluate_tasks(
    path: str | Path, which: list[str] | None = None, *, base: str | Path | None = None,
    text: str | Path | Mapping[str, str | Path] | None = None, baseline: Any = None, device: str = "auto", dtype: Any = None,
    **options: Any,
) -> dict[str, EvalReport]:  # fmt: skip
    """Measure some tasks of a bundle (default: all), switching one model in place. `text` is one file or {task: file};
    `options` are those of `evaluate`. The reports are written into the bundle's report.json.
    """
    from compress import loading
    from compress.checkpoint import bundled
    from compress.checkpoint.writer import write_json
    from compress.evaluation import REPORT, _log, _open, _place, evaluate

    folder = Path(path)
    known = bundled.facts(folder)
    names = list(known["tasks"]) if which is None else which
    for name in names:
        bundled.task_folder(folder, known, name)
    files = _files(text, names)
    place, precision = _place(device, dtype)
    model: Any = loading.load(folder, task=names[0], base=base, device=place, dtype=precision, exact=True)
    other = None if baseline is None else _open(baseline, place, precision, False)
    out = {}
    for name in names:
        model.set_task(name)
        report = evaluate(model, baseline=other, text=files[name], tokenizer=tokenizer(model.bundle, name), **options)
        known_as = None if baseline is None else Path(str(baseline)).name
        out[name] = EvalReport(f"{folder.resolve().name}: {name}", known_as, report.settings, report.metrics)
    try:
        write_json(folder / REPORT, {"tasks": {n: r.to_dict() for n, r in out.items()}})
    except CompressError as error:
        _log.warning("%s; the report is not stored", error.message)
    return out


def tokenizer(bundle: Any, task: str) -> Any:
    """A task's tokenizer."""
    from compress.calibration import load_tokenizer

    with bundle.companions(task) as folder:
        return load_tokenizer(folder)


def task_losses(
    folder: Path, texts: Mapping[str, Path], base: Path, count: int, seqlen: int | None, device: str
) -> dict[str, float]:  # fmt: skip
    """Mean loss in nats of each task of a bundle on its own text, the first `count` windows."""
    from compress import loading
    from compress.evaluation import _read, _seqlen
    from compress.evaluation.perplexity import perplexity, windows

    names = list(texts)
    model: Any = loading.load(folder, task=names[0], base=base, device=device, dtype=_precision(device), exact=True)
    out = {}
    for name, path in texts.items():
        model.set_task(name)
        ids = windows(_read(path), tokenizer(model.bundle, name), _seqlen(seqlen, model), count)
        out[name] = perplexity(model, ids)[1]
    return out


def _precision(device: str) -> Any:
    """float32 on a CPU, the checkpoint's own elsewhere."""
    import torch

    return torch.float32 if torch.device(device).type == "cpu" else None

"""Fine-tunes of one base become one ordinary checkpoint (`merge`)."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import devices
from compress.bundling import Tunes, ignored, known, opened, refuse_unmatched
from compress.checkpoint import manifest, source
from compress.checkpoint.writer import MAX_SHARD, disk_errors, fsync_folder, plan_shards, write_file
from compress.errors import CompressError
from compress.methods import _taskmask
from compress.pipeline import artifact, memory, tensors
from compress.pipeline.blend import Blend
from compress.pipeline.places import already_done, check_space, places
from compress.pipeline.resume import WorkDir, fingerprint, may_replace, tidy
from compress.types import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge` made."""

    path: Path
    alpha: float
    tasks: dict[str, dict[str, Any]]  # lambda, and with validation texts the loss of the merged model and of the fine-tune
    bytes: int
    seconds: float
    resumed: bool = False


def merge(
    base: str | Path, finetunes: Tunes, out: str | Path, *, method: str = "consensus",
    validation: Mapping[str, str | Path] | None = None, validation_windows: int = 64, seqlen: int | None = None,
    ignore: Sequence[str] = (), device: str = "auto", work_dir: str | Path | None = None, resume: bool = True,
    max_shard_size: int = MAX_SHARD, progress: Callable[[Progress], None] | None = None, **config: Any,
) -> MergeReport:  # fmt: skip
    """Merge fine-tunes of one base into an ordinary checkpoint at `out`, in the base's dtypes and layout; arguments as `bundle`.

    With `validation` texts, {name: file}, each task's lambda is that of the least loss of its masked model, and alpha that of the
    least mean of loss / the fine-tune's own loss; without them both are fixed values, said in the report.
    """
    began = time.monotonic()
    blend, facts, texts = _prepare(base, finetunes, method, ignore, device, validation, config)
    windows = [validation_windows, seqlen] if texts else None
    mark = fingerprint({**facts, "shard": max_shard_size, "windows": windows})
    target, work_path = places(Path(out), Path(work_dir) if work_dir is not None else None)
    replace = not resume or may_replace(work_path, mark)
    if already_done(target, mark, not resume, replace):
        if work_dir is None:
            tidy(work_path)
        logger.info("%s is already there, made by the same job (--restart makes it again)", target)
        return _report(target, began, True)
    tensors.refuse_duplicates(blend.base, blend.tunes, blend.items)
    work = WorkDir(work_path, mark, restart=not resume)
    resumed = work.done > 0
    try:
        check_space(work, plan_shards(blend.plan(), max_shard_size))
        state = work.state
        if blend.config.trims and "trim" not in state:
            state["trim"] = tensors.thresholds(blend.base, blend.tunes, blend.items, blend.config.density, blend.device)
            work.commit(work.done)
        blend.trim = state.get("trim")
        lambdas, alpha, tasks = _choose(blend, work, texts, validation_windows, seqlen)
        memory.map_large_tensors()
        blend.write(work, lambdas, alpha, max_shard_size, progress)
        _companions(blend, work.artifact, str(facts["method"]), alpha)
        chosen = {"alpha": alpha, "tasks": tasks, "counts": state["counts"]}
        artifact.write_manifest(work.artifact, {**facts, "job": mark, "merge": chosen})
        work.publish(target, work_dir is not None, replace)
    finally:
        work.close()
    return _report(target, began, resumed)


def _prepare(
    base: str | Path, finetunes: Tunes, method: str, ignore: Sequence[str], device: str,
    validation: Mapping[str, str | Path] | None, options: Mapping[str, Any],
) -> tuple[Blend, dict[str, Any], dict[str, Path]]:  # fmt: skip
    """Check everything that headers tell."""
    module, config, first, tunes = opened("merge", base, finetunes, method, options)
    found = tensors.items(first, tunes, ignored(ignore), vectors=True)
    refuse_unmatched(ignore, found)
    _refuse_unequal(first, tunes, found)
    texts = {n: Path(p) for n, p in (validation or {}).items()}
    names = [t.name for t in tunes]
    if texts and sorted(texts) != sorted(names):
        odd = sorted(set(texts) ^ set(names))[0]
        raise CompressError(f"--validation: {odd} has no text or is no task", hint=f"tasks: {', '.join(names)}", usage=True)
    place = devices.pick(device)
    facts = known(first, tunes, method, config, "dense", ignore)
    facts |= {"device": place.split(":")[0], "validation": {n: source.sha256(p) for n, p in texts.items()} or None}
    return Blend(first, tunes, found, module, config, place), facts, texts


def _refuse_unequal(base: tensors.Source, tunes: Sequence[tensors.Source], found: Sequence[tensors.Item]) -> None:
    """A merged checkpoint has the base's vocabulary; what only some checkpoints have is left out, with a warning."""
    for tune in tunes:
        for item in found:
            if item.shape is not None and item.name in tune.names and tune.view.shape(item.name) != item.shape:
                raise CompressError(
                    f"{tune.name}: {item.name} has {tune.view.shape(item.name)[0]} rows, the base has {item.shape[0]}",
                    hint="merge fine-tunes of one vocabulary, or compress bundle them",
                )
    extra = [i.name for i in found if i.shape is None]
    if extra:
        logger.warning("%s and %d more tensors are not in the base: they are left out", extra[0], len(extra) - 1)


# -- lambda and alpha ------------------------------------------------------------------------------------------------------


def _choose(
    blend: Blend, work: WorkDir, texts: Mapping[str, Path], count: int, seqlen: int | None
) -> tuple[list[float], float, dict[str, dict[str, Any]]]:  # fmt: skip
    """lambda of every fine-tune, alpha, and what is said of each task."""
    config, names = blend.config, [t.name for t in blend.tunes]
    if not texts:
        alpha = config.alpha if config.alpha is not None else blend.method.ALPHA
        lambdas = [config.lam] * len(names) if config.masked else []
        return lambdas, alpha, {n: {"lambda": config.lam} if config.masked else {} for n in names}
    trial = _Trial(blend, work, texts, count, seqlen)
    own = trial.own()
    lambdas = trial.lambdas() if config.masked else []
    alphas = blend.method.ALPHAS if config.alpha is None else (config.alpha,)
    losses = {a: trial.merged(lambdas, a) for a in alphas}
    alpha = min(alphas, key=lambda a: math.fsum(losses[a][n] / own[n] for n in names))
    rows = {n: {"loss": losses[alpha][n], "own": own[n]} for n in names}
    for name, lam in zip(names, lambdas, strict=False):
        rows[name]["lambda"] = lam
    return lambdas, alpha, rows


class _Trial:
    """Losses on the validation texts with one model in memory; results are kept with the resume point."""

    def __init__(self, blend: Blend, work: WorkDir, texts: Mapping[str, Path], count: int, seqlen: int | None) -> None:
        from compress import loading
        from compress.calibration import load_tokenizer
        from compress.evaluation import _read, _seqlen
        from compress.evaluation.bundles import _precision
        from compress.evaluation.perplexity import windows

        self.blend, self.work = blend, work
        self.known = work.state.setdefault("losses", {})
        self.model = loading.load(blend.base.folder, device=blend.device, dtype=_precision(blend.device), exact=True)
        tokenizer = load_tokenizer(blend.base.folder)
        length = _seqlen(seqlen, self.model)
        self.ids = {n: windows(_read(p), tokenizer, length, count) for n, p in texts.items()}

    def _loss(self, key: str, name: str, fill: Callable[[], None] | None) -> float:
        from compress.evaluation.perplexity import perplexity

        row = f"{key} {name}"
        if row not in self.known:
            if fill is not None:
                fill()
            self.known[row] = perplexity(self.model, self.ids[name])[1]
            self.work.commit(self.work.done)
        return float(self.known[row])

    def own(self) -> dict[str, float]:
        """Each fine-tune's loss on its own text."""
        found = {}
        for tune in self.blend.tunes:
            alone = Blend(self.blend.base, [tune], _only(self.blend, tune.name), _Sum, None, self.blend.device)
            found[tune.name] = self._loss("own", tune.name, functools.partial(alone.fill, self.model, [], 1.0))
        return found

    def lambdas(self) -> list[float]:
        """Each task's lambda of the least loss; ties go to the smallest."""
        out = []
        for i, tune in enumerate(self.blend.tunes):
            losses = {}
            for lam in _taskmask.LAMBDAS:
                fill = functools.partial(self.blend.masked, self.model, i, lam)
                losses[lam] = self._loss(f"lambda {lam}", tune.name, fill)
            out.append(min(_taskmask.LAMBDAS, key=losses.__getitem__))
        return out

    def merged(self, lambdas: Sequence[float], alpha: float) -> dict[str, float]:
        """Every task's loss of the merged model."""
        todo = [n for n in self.ids if f"alpha {alpha} {n}" not in self.known]
        if todo:
            self.blend.fill(self.model, lambdas, alpha)
        return {name: self._loss(f"alpha {alpha}", name, None) for name in self.ids}


class _Sum:
    """The one fine-tune's own deltas."""

    @staticmethod
    def merged(tau: Any, lambdas: Any, config: Any, trim: Any) -> Any:
        """tau[0]."""
        return tau[0]


def _only(blend: Blend, name: str) -> list[tensors.Item]:
    """The items with only one fine-tune's deltas."""
    return [tensors.Item(i.name, i.shape, tuple(n for n in i.masked if n == name), ()) for i in blend.items]


# -- files -----------------------------------------------------------------------------------------------------------------


def _companions(blend: Blend, folder: Path, method: str, alpha: float) -> None:
    for path in source.companions(blend.base.folder):
        with disk_errors(folder / path.name):
            shutil.copyfile(path, folder / path.name)
    artifact.write_json_as_is(folder / "config.json", blend.base.config)
    names = ", ".join(f"`{t.name}`" for t in blend.tunes)
    card = (
        f"---\nlibrary_name: transformers\ntags: [compress, merge, {method}]\n---\n"
        f"# {blend.base.name} merged with {len(blend.tunes)} fine-tunes\n\n"
        f"Made with llm-compress: {method}, alpha {alpha:g}, of {names}. An ordinary checkpoint.\n"
    )
    write_file(folder / "README.md", card.encode())
    fsync_folder(folder)


def _report(out: Path, began: float, resumed: bool) -> MergeReport:
    known = manifest.read(out)
    size = sum(f["bytes"] for n, f in known["files"].items() if n.endswith(".safetensors"))
    chosen = known["merge"]
    return MergeReport(out, chosen["alpha"], chosen["tasks"], size, time.monotonic() - began, resumed)

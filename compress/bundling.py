"""Many fine-tunes become one artifact (`bundle`)."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from compress import devices, registry
from compress.checkpoint import bundled, manifest, source
from compress.checkpoint.reader import matrix
from compress.checkpoint.writer import MAX_SHARD, disk_errors, fsync_folder, write_file, write_json
from compress.errors import CompressError
from compress.fit import versions
from compress.formats import masked_delta
from compress.job import make_config
from compress.methods import _taskmask
from compress.pipeline import artifact, memory, planes, tensors
from compress.pipeline.layout import matcher
from compress.pipeline.places import TOOL, already_done, places
from compress.pipeline.planes import SHARED, Walk
from compress.pipeline.resume import WorkDir, fingerprint, may_replace, tidy
from compress.pipeline.tensors import Item, Source
from compress.types import Progress

logger = logging.getLogger(__name__)
Tunes = Sequence[str | Path] | Mapping[str, str | Path]


@dataclass(frozen=True, slots=True)
class BundleReport:
    """What `bundle` made. Bytes are of weight files."""

    path: Path
    tasks: dict[str, float]  # relative squared error of each task's deltas
    lambdas: dict[str, float | None]
    bytes_shared: int
    bytes_tasks: int
    bytes_base: int  # of the base, copied or not
    bytes_separate: int  # of the fine-tunes as they were
    above_one: list[str] = field(default_factory=list)  # "task: tensor" whose error is above 1
    seconds: float = 0.0
    resumed: bool = False

    @property
    def bytes(self) -> int:
        """Shared vector and tasks."""
        return self.bytes_shared + self.bytes_tasks


@dataclass(frozen=True)
class _Job:
    """A prepared bundle: headers read, nothing computed."""

    base: Source
    tunes: list[Source]
    items: list[Item]
    name: str
    method: ModuleType
    config: Any
    device: str
    max_shard: int
    include_base: bool
    progress: Callable[[Progress], None] | None
    facts: dict[str, Any]


def bundle(
    base: str | Path, finetunes: Tunes, out: str | Path, *, method: str = "tallmask",
    validation: Mapping[str, str | Path] | None = None, validation_windows: int = 64, seqlen: int | None = None,
    include_base: bool = False, ignore: Sequence[str] = (), device: str = "auto", work_dir: str | Path | None = None,
    resume: bool = True, max_shard_size: int = MAX_SHARD, progress: Callable[[Progress], None] | None = None, **config: Any,
) -> BundleReport:  # fmt: skip
    """Bundle fine-tunes of one base into the folder `out`: a shared vector, and one bit per weight and task.

    `finetunes` are folders or hub ids, "name=folder", or {name: folder}; PEFT LoRA folders are merged on read. `validation` gives
    each task's text, {name: file}: lambda is then chosen per task by loss, which loads the model. `config`: the method's options.
    The base is referenced by hash unless `include_base`. `ignore` names tensors ("re:…" or in full) that are stored whole.
    """
    began = time.monotonic()
    job = _prepare(base, finetunes, method, ignore, device, max_shard_size, include_base, progress, config)
    texts = _texts(job, validation)
    facts = {**job.facts, "validation": {n: source.sha256(p) for n, p in texts.items()} or None}
    mark = fingerprint({**facts, "shard": max_shard_size, "windows": [validation_windows, seqlen] if texts else None})
    target, work_path = places(Path(out), Path(work_dir) if work_dir is not None else None)
    replace = not resume or may_replace(work_path, mark)
    if already_done(target, mark, not resume, replace):
        if work_dir is None:
            tidy(work_path)
        logger.info("%s is already there, made by the same job (--restart makes it again)", target)
        return _report(job, target, began, True)
    tensors.refuse_duplicates(job.base, job.tunes, job.items)
    work = WorkDir(work_path, mark, restart=not resume)
    resumed = work.done > 0
    try:
        _check_space(job, work)
        lambdas = _lambdas(job, work, texts, validation_windows, seqlen)
        memory.map_large_tensors()
        report = _build(job, work, lambdas)
        artifact.write_manifest(work.artifact, {**facts, "job": mark, "tasks": report})
        work.publish(target, work_dir is not None, replace)
    finally:
        work.close()
    return _report(job, target, began, resumed)


def _prepare(
    base: str | Path, finetunes: Tunes, method: str, ignore: Sequence[str], device: str, max_shard: int, include_base: bool,
    progress: Callable[[Progress], None] | None, options: Mapping[str, Any],
) -> _Job:  # fmt: skip
    """Check everything that headers tell."""
    module, config, first, tunes = opened("bundle", base, finetunes, method, options)
    found = tensors.items(first, tunes, ignored(ignore), config.embeddings)
    refuse_unmatched(ignore, found)
    place = devices.pick(device)
    facts = known(first, tunes, method, config, "bundle", ignore)
    facts |= {"include_base": include_base, "device": place.split(":")[0]}
    return _Job(first, tunes, found, str(facts["method"]), module, config, place, max_shard, include_base, progress, facts)


def ignored(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a tensor's name, with or without `.weight`, matches one of `--ignore`."""
    test = matcher(tuple(patterns))
    return lambda name: bool(test(name) or test(name.removesuffix(".weight")))


def refuse_unmatched(patterns: Sequence[str], found: Sequence[tensors.Item]) -> None:
    """A pattern of `--ignore` that matches nothing is a mistake."""
    for pattern in patterns:
        if not any(map(ignored([pattern]), (i.name for i in found))):
            raise CompressError(f"--ignore {pattern!r} matches no tensor", hint=f"names look like {found[-1].name}", usage=True)


def opened(
    verb: str, base: str | Path, finetunes: Tunes, method: str, options: Mapping[str, Any]
) -> tuple[ModuleType, Any, Source, list[Source]]:  # fmt: skip
    """A method of `verb` and its config, the base and the fine-tunes."""
    module = registry.load("methods", method)
    if registry.verb(method) != verb:
        why, hint = f"{method} is a method of compress {registry.verb(method)}, not of {verb}", "compress methods lists them"
        raise CompressError(why, hint=hint, usage=True)
    config = make_config(module, options)
    first = tensors.open_source(base, _name(base))
    return module, config, first, [tensors.open_source(path, name, first) for name, path in tensors.named(finetunes).items()]


def known(base: Source, tunes: Sequence[Source], method: str, config: Any, form: str, ignore: Sequence[str]) -> dict[str, Any]:
    """What the manifest of a job over several checkpoints says before any work."""
    return {
        "tool": f"{TOOL} {versions()[TOOL]}", "format": form, "method": method.replace("-", "_").lower(),
        "config": planes.settings(config), "source": _origin(base), "seed": None, "calibration_sha256": None,
        "versions": versions(), "extra": [], "linears": {}, "search": [], "ignore": list(ignore),
        "finetunes": {t.name: _origin(t) for t in tunes},
    }  # fmt: skip


def _name(model: str | Path) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else str(model).rsplit("/", 1)[-1]


def _origin(one: Source) -> dict[str, Any]:
    """Provenance of a checkpoint."""
    revision = source.revision(one.folder)
    return {"name": one.name, "revision": revision, "files": one.files, "weight_bytes": one.weight_bytes, "adapter": one.adapter}


def _texts(job: _Job, validation: Mapping[str, str | Path] | None) -> dict[str, Path]:
    """Validation files by task; all tasks or none, and only where lambda can be chosen."""
    if not validation:
        return {}
    if not job.config.tuned:
        raise CompressError("--validation chooses lambda, which only --mode mask has", hint="-m tallmask --mode mask", usage=True)
    names = [t.name for t in job.tunes]
    for name in [*validation, *names]:
        if name not in names:
            raise CompressError(f"--validation {name}: no such task", hint=f"tasks: {', '.join(names)}", usage=True)
        if name not in validation:
            raise CompressError(f"--validation for {name} is missing", hint="give every task its text", usage=True)
    return {name: Path(path) for name, path in validation.items()}


def _check_space(job: _Job, work: WorkDir) -> None:
    """Refuse to start what cannot be finished: spools, and the largest of them once more while it becomes shards."""
    shared, tasks = 0, dict.fromkeys((t.name for t in job.tunes), 0)
    width = masked_delta.width(job.config.shared) * (2 if job.config.pair else 1)
    for item in job.items:
        if item.masked and item.shape is not None:
            rows, columns = matrix(item.shape)
            shared += 0 if job.config.shared == _taskmask.CONSTANT else rows * columns * width // 8
            for name in item.masked:
                tasks[name] += rows * masked_delta.words(columns) * 4
        for tune in job.tunes:
            if tune.name in item.whole:
                tasks[tune.name] += tune.view.reader.entry(tune.view.source(item.name)).nbytes
    need = shared + sum(tasks.values()) + max(shared, *tasks.values())
    spool = work.path / "spool"
    need -= sum(p.stat().st_size for p in spool.iterdir()) if spool.is_dir() else 0
    need += job.base.weight_bytes if job.include_base else 0
    free = shutil.disk_usage(work.path).free
    if need > free:
        raise CompressError(
            f"{work.path}: the bundle needs up to {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
            hint="free some space, or choose an -o on another disk",
        )


# -- lambda ----------------------------------------------------------------------------------------------------------------


def _lambdas(
    job: _Job, work: WorkDir, texts: Mapping[str, Path], count: int, seqlen: int | None
) -> dict[str, float]:  # fmt: skip
    """Each task's lambda: the config's, or that of the least loss on its text; ties go to the smallest, the densest mask."""
    if not texts:
        return {t.name: job.config.lam for t in job.tunes} if job.config.tuned else {}
    from compress.evaluation.bundles import task_losses

    losses = work.state.setdefault("losses", {})
    for lam in _taskmask.LAMBDAS:
        if str(lam) in losses:
            continue
        trial = WorkDir(work.path / "trial", fingerprint({"job": work.job, "lambda": lam}), restart=True)
        try:
            _build(job, trial, {t.name: lam for t in job.tunes}, base=False)
            losses[str(lam)] = task_losses(trial.artifact, texts, job.base.folder, count, seqlen, job.device)
        finally:
            trial.close()
            shutil.rmtree(trial.path, ignore_errors=True)
        work.commit(work.done)
        logger.info("lambda %g: %s", lam, ", ".join(f"{n} {x:.4f}" for n, x in losses[str(lam)].items()))
    return {t.name: min(_taskmask.LAMBDAS, key=lambda lam, n=t.name: losses[str(lam)][n]) for t in job.tunes}  # type: ignore[misc]


# -- writing ---------------------------------------------------------------------------------------------------------------


def _build(job: _Job, work: WorkDir, lambdas: Mapping[str, float], base: bool = True) -> dict[str, Any]:
    """Everything but the manifest, into the work folder's artifact; returns the tasks' part of the manifest."""
    walk = Walk(job.base, job.tunes, job.items, job.method, job.config, lambdas, job.device, work, job.progress)
    spool = walk.run()
    parts = (SHARED, planes.LOW) if job.config.pair else (SHARED,)
    folders = {part: work.artifact / part for part in parts}
    folders |= {planes.stream(t.name): work.artifact / "tasks" / t.name for t in job.tunes}
    done = work.state.setdefault("assembled", [])
    for name, folder in folders.items():
        if name not in done:
            shutil.rmtree(folder, ignore_errors=True)
            with disk_errors(folder):
                folder.mkdir(parents=True)
            spool.assemble(name, folder, job.max_shard)
            done.append(name)
            work.commit(work.done)
        spool.drop(name)
    spool.close()
    report = walk.report()
    _warn(report)
    _write_tasks(job, work, report)
    _write_base(job, work.artifact, base)
    _write_facts(job, work, lambdas)
    rows = ("lambda", "error")
    return {t.name: {**_origin(t), **{k: report[t.name][k] for k in rows}} for t in job.tunes}


def _warn(report: Mapping[str, Mapping[str, Any]]) -> None:
    """Say which tensors came out worse than the base's own."""
    for task, row in report.items():
        bad = [n for n, r in row["tensors"].items() if r["error"] > 1]
        if not row["tensors"]:
            logger.warning("%s: equal to the base in every tensor that is masked", task)
        if bad:
            hint = "another --mode, or a larger lambda"
            logger.warning("%s: %d tensors lose more than the base would (%s …): %s", task, len(bad), bad[0], hint)


def _write_tasks(job: _Job, work: WorkDir, report: Mapping[str, Any]) -> None:
    """config.json, tokenizer and the like of every task; files that are the base's stay there."""
    ours = {p.name: p for p in source.companions(job.base.folder)}
    files: dict[str, dict[str, str]] = {}
    for tune in job.tunes:
        folder = work.artifact / "tasks" / tune.name
        own = {p.name: p for p in source.companions(tune.folder) if not p.name.startswith("adapter_")}
        wanted = {**ours, **own} if tune.adapter else own
        files[tune.name] = {}
        for name, path in sorted(wanted.items()):
            same = name in ours and source.sha256(path) == source.sha256(ours[name])
            files[tune.name][name] = bundled.BASE if same else "own"
            if not same:
                with disk_errors(folder / name):
                    shutil.copyfile(path, folder / name)
        artifact.write_json_as_is(folder / "config.json", bundled.guard(tune.config))
        write_json(folder / "task.json", {"source": _origin(tune), **report[tune.name]})
        fsync_folder(folder)
    work.state["files"] = files


def _write_base(job: _Job, folder: Path, wanted: bool) -> None:
    """The reference, or with --include-base the base itself."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    write_json(base / bundled.REFERENCE, _origin(job.base))
    if wanted and job.include_base:
        for name in job.base.files:
            with disk_errors(base / name):
                shutil.copyfile(job.base.folder / name, base / name)
        fsync_folder(base)


def _write_facts(job: _Job, work: WorkDir, lambdas: Mapping[str, float]) -> None:
    state = work.state
    names = job.base.names
    weights = set(job.base.view.reader.files())
    base = {
        "name": job.base.name, "revision": source.revision(job.base.folder), "included": job.include_base,
        "files": {n: d for n, d in job.base.files.items() if n in weights},
        "hub": job.base.hub,
        "stored": {n: job.base.view.source(n) for n in names if job.base.view.source(n) != n},
    }  # fmt: skip
    tasks = {t.name: {"tensors": state["records"].get(t.name, {}), "files": state["files"][t.name]} for t in job.tunes}
    total = sum(matrix(tuple(s["shape"]))[0] * matrix(tuple(s["shape"]))[1] for s in state["shapes"].values())
    write_json(
        work.artifact / bundled.FILE,
        {
            "schema": bundled.SCHEMA, "kind": masked_delta.KIND, "version": masked_delta.VERSION, "method": job.name,
            "bit_order": masked_delta.BIT_ORDER, "bits": _bits(job.config), "shared": job.config.shared,
            "parameters": total, "base": base, "tensors": state["shapes"], "tasks": tasks, "lambdas": dict(lambdas),
        },
    )  # fmt: skip
    artifact.write_json_as_is(work.artifact / "config.json", bundled.guard(job.base.config))
    write_file(work.artifact / "README.md", _card(job).encode())


def _bits(config: Any) -> str:
    """What the bits are."""
    return "level" if config.pair else "sign" if config.are_signs else "mask"


def _card(job: _Job) -> str:
    """The model card."""
    names = "\n".join(f"- `{t.name}`" for t in job.tunes)
    mode = f", mode {job.config.mode}" if hasattr(job.config, "mode") else ""
    where = "in `base/`" if job.include_base else "not in it: `base/reference.json` names its hashes"
    return (
        f"---\ntags: [compress, {job.name}]\n---\n# Bundle of {len(job.tunes)} fine-tunes of {job.base.name}\n\n"
        f"Made with llm-compress: {job.name}{mode}, shared vector {job.config.shared}, one bit per weight and task.\n\n{names}\n\n"
        f"`compress.load(FOLDER, task=NAME, base=BASE)` runs a task, `compress extract` makes it an ordinary checkpoint again.\n"
        f"Stock loaders refuse this folder. The base is {where}.\n"
    )


def _report(job: _Job, out: Path, began: float, resumed: bool) -> BundleReport:
    known = manifest.read(out)

    def size(part: str) -> int:
        return sum(f["bytes"] for n, f in known["files"].items() if n.startswith(part) and n.endswith(".safetensors"))

    rows = {name: bundled.read_json(out / "tasks" / name / "task.json") for name in known["tasks"]}
    bad = [f"{task}: {n}" for task, row in rows.items() for n, r in row["tensors"].items() if r["error"] > 1]
    return BundleReport(
        out, {n: r["error"] for n, r in rows.items()}, {n: r["lambda"] for n, r in rows.items()}, size("shared/") + size("low/"),
        size("tasks/"),
        job.base.weight_bytes, sum(t.weight_bytes for t in job.tunes), bad, time.monotonic() - began, resumed,
    )  # fmt: skip

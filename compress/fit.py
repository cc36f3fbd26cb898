"""Arguments become a job, a job becomes an artifact: `quantize` and what it shares with the other verbs."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from compress import calibration, devices, registry
from compress.checkpoint import manifest, source
from compress.checkpoint.writer import MAX_SHARD, CheckpointWriter, Shard, disk_errors, plan_shards
from compress.errors import CompressError, nearest
from compress.models import rotate
from compress.models.head import Head
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView
from compress.pipeline import artifact, layout, memory
from compress.pipeline.blocks import Blocks
from compress.pipeline.choices import WIDTH_SAMPLES, Choices, Widths, decide, reducers
from compress.pipeline.estimate import Estimate, estimate, on_disk, reverse_bytes, reverse_seconds
from compress.pipeline.forward import Forward, Walk
from compress.pipeline.resume import WorkDir, fingerprint, may_replace, tidy
from compress.pipeline.reverse import Reverse
from compress.types import Progress

logger = logging.getLogger(__name__)
TOOL = "llm-compress"
_BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished run made."""

    path: Path
    linears: int
    bits_per_weight: float  # of the compressed linears
    bytes: int  # of the artifact's weight files
    source_bytes: int
    mean_error: float
    seconds: float
    resumed: bool


@dataclass(frozen=True)
class Job:
    """A prepared run: everything read from headers, nothing computed yet."""

    folder: Path
    name: str
    method_name: str
    method: ModuleType
    config: Any
    skeleton: Skeleton
    view: CheckpointView
    layout: layout.Layout
    device: str
    dtype: torch.dtype
    batch_size: int
    nsamples: int
    seqlen: int | None
    max_shard: int
    format: str
    ignore: tuple[str, ...]
    widths: Widths

    def planned(self, choices: Choices) -> Job:
        """The same job with format params that its linears were given."""
        mixed = self.widths.asked
        plan = layout.make(self.skeleton, self.view, self.config, self.format, self.ignore, choices, mixed)
        return dataclasses.replace(self, layout=plan)

    @property
    def needs_text(self) -> bool:
        """Whether the job reads calibration text."""
        return bool(self.method.CALIBRATED) or self.widths.target is not None

    @property
    def observes(self) -> bool:
        """Whether text runs through the blocks while they are compressed."""
        own = getattr(self.method, "observes", None)
        return bool(self.method.CALIBRATED if own is None else own(self.config))

    @property
    def samples(self) -> int:
        """Calibration windows that gradients are taken from, the first ones."""
        return min(self.nsamples, int(getattr(self.config, "samples", WIDTH_SAMPLES)))

    @property
    def expand(self) -> int:
        """Shifted copies of the calibration windows."""
        return int(getattr(self.config, "expand", 1))


def make_config(method: ModuleType, options: dict[str, Any]) -> Any:
    """The method's Config from keyword options; an unknown one is answered with the nearest."""
    known = [f.name for f in dataclasses.fields(method.Config)]
    for key in options:
        if key not in known:
            raise CompressError(f"unknown option {key!r}", hint=nearest(key, known), usage=True)
    return method.Config(**options)


def prepare(
    model: str | Path, method: str, *, format: str, ignore: tuple[str, ...], device: str, batch_size: int | None,
    nsamples: int, seqlen: int | None, max_shard: int, trust_remote_code: bool, options: dict[str, Any],
    layer_config: Sequence[str] = (), target_bpw: float | None = None,
) -> Job:  # fmt: skip
    """Check every option against the checkpoint's headers."""
    module = registry.load("methods", method)
    config = make_config(module, options)
    folder = source.resolve(model)
    hf_config = load_config(folder, trust_remote_code)
    rotation = module.transform(config) if hasattr(module, "transform") else None
    skeleton, view = rotate.open_model(folder, hf_config, rotation, trust_remote_code)
    widths = Widths(tuple(layer_config), target_bpw)
    plan = layout.make(skeleton, view, config, format, ignore, None, widths.asked)
    device = devices.pick(device)
    half = device != "cpu" and all(t.dtype == "BF16" for t in plan.targets.values())
    length = calibration.pick_seqlen(seqlen, hf_config) if module.CALIBRATED or target_bpw is not None else seqlen
    if batch_size is not None and batch_size < 1:
        raise CompressError(f"--batch-size {batch_size} is not a number of windows", hint="use 1 or more", usage=True)
    batch = batch_size or max(1, _BATCH_TOKENS // (length or _BATCH_TOKENS))
    name = folder.resolve().name if Path(model).is_dir() else str(model).rsplit("/", 1)[-1]
    job = Job(
        folder, name, method.replace("-", "_").lower(), module, config, skeleton, view, plan, device,
        torch.bfloat16 if half else torch.float32, batch, nsamples, length, max_shard, format, ignore, widths,
    )  # fmt: skip
    widths.check(plan)
    for linear in plan.left:
        logger.warning("%s stays dense: compressed-tensors 0.20 cannot read 4-bit zero-points of so few outputs", linear)
    if reducers(module, config, plan, widths):
        Head(skeleton, view, job.dtype)  # refuses what gradients do not know, before anything is read
        if not job.observes:  # no other window would be looked at
            job = dataclasses.replace(job, nsamples=job.samples)
    return job.planned(widths.guess(plan))


def versions() -> dict[str, str]:
    """Versions that decide an artifact's bytes."""
    return {TOOL: metadata.version(TOOL), "torch": torch.__version__, "transformers": metadata.version("transformers")}


def quantize(
    model: str | Path,
    method: str,
    out: str | Path,
    *,
    dataset: str | Path | None = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    format: str = "pack-quantized",
    ignore: tuple[str, ...] | list[str] = (),
    layer_config: tuple[str, ...] | list[str] = (),
    target_bpw: float | None = None,
    states: str = "auto",
    work_dir: str | Path | None = None,
    resume: bool = True,
    max_shard_size: int = MAX_SHARD,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **config: Any,
) -> Report:
    """Quantize a Hugging Face checkpoint into the folder `out` with a method of `compress methods`.

    `config` are the method's options (`bits`, `group_size`, …). `layer_config` gives linears widths of their own
    ("re:.*down_proj=8"); `target_bpw` chooses those of the others from 2, 3, 4 and 8 bits, so that all linears take at most so many
    bits per weight and the measured loss is least. An unfinished run of the same job is continued unless
    `resume=False`; the artifact appears under `out` by one rename, when it is whole.
    """
    began = time.monotonic()
    job = prepare(
        model, method, format=format, ignore=tuple(ignore), device=device, batch_size=batch_size, nsamples=nsamples, seqlen=seqlen,
        max_shard=max_shard_size, trust_remote_code=trust_remote_code, options=config, layer_config=layer_config,
        target_bpw=target_bpw,
    )  # fmt: skip
    if states not in ("auto", "ram", "disk"):
        raise CompressError(f"--states {states!r} is unknown", hint="use auto, ram or disk", usage=True)
    calib = _calibrate(job, dataset, seed, trust_remote_code) if job.needs_text else None
    facts = _facts(job, calib, seed)
    mark = _mark(job, facts)
    out, work_path = _places(Path(out), Path(work_dir) if work_dir is not None else None)
    replace = not resume or may_replace(work_path, mark)
    if _already_done(out, mark, not resume, replace):
        if work_dir is None:
            tidy(work_path)
        logger.info("%s is already there, made by the same job (--restart makes it again)", out)
        return _report(job, out, began, resumed=True)
    work = WorkDir(work_path, mark, restart=not resume)
    resumed = work.done > 0 or (work.path / "reverse").exists()
    try:
        _check_space(work, plan_shards(job.layout.plan, job.max_shard))
        with memory.long_run():
            job, located = _decide(job, calib, work, states, progress)
            _walk(job, calib, work, states, progress, located)
        _finish(job, work, {**facts, "job": mark, "format": format})
        work.publish(out, work_dir is not None, replace)
    finally:
        work.close()
    return _report(job, out, began, resumed)


def _mark(job: Job, facts: dict[str, Any]) -> str:
    """The job's fingerprint: everything that decides the bytes."""
    settings = {"format": job.format, "batch": job.batch_size, "device": job.device.split(":")[0], "ignore": list(job.ignore)}
    return fingerprint({**facts, **settings, "shard": job.max_shard})


def _decide(
    job: Job, calib: calibration.Calibration | None, work: WorkDir, states: str, progress: Callable[[Progress], None] | None
) -> tuple[Job, Reverse | None]:  # fmt: skip
    """The reverse walk, where the method or the widths ask for gradients, and the layout that follows from it."""
    makers = reducers(job.method, job.config, job.layout, job.widths)
    if not makers:
        return job, None
    assert calib is not None
    tokens = calib.tokens[: job.samples]
    blocks = Blocks(job.skeleton, job.view, job.device, job.dtype)
    kept = tokens.numel() * (len(blocks) + 1) // 3  # `on_disk` counts three copies
    disk = on_disk(states, kept, job.skeleton.config.get_text_config().hidden_size, job.dtype)
    folder = work.path / "reverse"
    walk = Reverse(blocks, job.layout, tokens, makers, folder, work.path if disk else None, work.job, progress)
    walk.run()
    return job.planned(decide(walk, job.method, job.config, job.widths)), walk


def _walk(
    job: Job, calib: calibration.Calibration | None, work: WorkDir, states: str, progress: Callable[[Progress], None] | None,
    located: Reverse | None,
) -> None:  # fmt: skip
    """Compress every block and finish the shards."""
    writer = CheckpointWriter(work.artifact, job.layout.plan, job.max_shard)
    writer.open(fresh=work.done == 0)
    tokens = calibration.expand(calib.tokens, job.expand) if calib is not None and job.observes else None
    width = job.skeleton.config.get_text_config().hidden_size
    disk = on_disk(states, tokens.numel() if tokens is not None else 0, width, job.dtype)
    walk = Walk(
        job.skeleton, job.view, job.layout, job.method, job.config, tokens, job.batch_size, job.device, job.dtype, disk, progress,
        None if located is None else located.result,
    )  # fmt: skip
    Forward(walk, writer, work).run()
    writer.finish()


def _finish(job: Job, work: WorkDir, facts: dict[str, Any]) -> None:
    """Everything beside the shards, the manifest last."""
    artifact.write_companions(
        job.folder, work.artifact, job.layout, job.skeleton, job.method_name, job.name, job.view.untied
    )  # fmt: skip
    artifact.write_manifest(work.artifact, {**facts, "linears": work.state["linears"], "search": work.state["search"]})


def dry_run(
    model: str | Path, method: str, *, nsamples: int = 128, seqlen: int | None = None, batch_size: int | None = None,
    device: str = "auto", format: str = "pack-quantized", ignore: tuple[str, ...] | list[str] = (), states: str = "auto",
    max_shard_size: int = MAX_SHARD, trust_remote_code: bool = False, layer_config: tuple[str, ...] | list[str] = (),
    target_bpw: float | None = None, **config: Any,
) -> Estimate:  # fmt: skip
    """Predict an artifact's size, the peak memory and the time from headers alone; reads no weight."""
    job = prepare(
        model, method, format=format, ignore=tuple(ignore), device=device, batch_size=batch_size, nsamples=nsamples, seqlen=seqlen,
        max_shard=max_shard_size, trust_remote_code=trust_remote_code, options=config, layer_config=layer_config,
        target_bpw=target_bpw,
    )  # fmt: skip
    size = sum(s.size for s in plan_shards(job.layout.plan, job.max_shard))
    tokens = job.nsamples * job.expand * (job.seqlen or 0) if job.observes else 0
    windows = (tokens, job.batch_size, job.seqlen or 0)
    found = estimate(job.skeleton, job.view, job.layout, job.method, job.config, size, *windows, job.dtype, states)
    makers = reducers(job.method, job.config, job.layout, job.widths)
    if not makers or job.seqlen is None:
        return found
    exact = target_bpw is None and getattr(job.config, "scope", "tensor") == "tensor"
    peak = reverse_bytes(job.skeleton, job.view, len(makers), job.samples, job.seqlen, job.dtype, states)
    seconds = reverse_seconds(job.layout, job.samples * job.seqlen, 4 if target_bpw is not None else 0)
    peak = max(found.peak_memory, peak)
    return dataclasses.replace(found, peak_memory=peak, seconds=found.seconds + seconds, exact=exact)


def _calibrate(job: Job, dataset: str | Path | None, seed: int | None, trust_remote_code: bool) -> calibration.Calibration:
    assert job.seqlen is not None
    tokenizer = calibration.load_tokenizer(job.folder, trust_remote_code)
    vocab = job.skeleton.model.get_input_embeddings().num_embeddings
    return calibration.load(dataset, tokenizer, nsamples=job.nsamples, seqlen=job.seqlen, seed=seed, vocab=vocab)


def _facts(job: Job, calib: calibration.Calibration | None, seed: int | None) -> dict[str, Any]:
    """The manifest's provenance, known before the work starts."""
    return {
        "tool": f"{TOOL} {metadata.version(TOOL)}",
        "source": {
            "name": job.name,
            "revision": source.revision(job.folder),
            "files": source.hashes(job.folder, job.view.reader.files()),
            "weight_bytes": sum(e.nbytes for e in job.view.reader.entries.values()),
        },
        "method": job.method_name,
        "config": dataclasses.asdict(job.config),
        "seed": seed,
        "calibration_sha256": calib.sha256 if calib is not None else None,
        "versions": versions() | ({"scipy": metadata.version("scipy")} if job.widths.target is not None else {}),
        "extra": job.view.extra,
        **job.widths.record(),
    }


def _places(out: Path, work_dir: Path | None) -> tuple[Path, Path]:
    """The output folder and the work folder, with their parents made; the artifact must move by a rename between them."""
    if not out.absolute().name:
        raise CompressError(f"{out} cannot be an output folder", hint="give -o a new name", usage=True)
    work = work_dir if work_dir is not None else out.absolute().with_name(out.absolute().name + ".partial")
    a, b = out.resolve(), work.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise CompressError(f"{out} and --work-dir {work} lie inside each other", hint="put them side by side", usage=True)
    with disk_errors(out):
        for path in (out, work):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
    if out.absolute().parent.stat().st_dev != work.absolute().parent.stat().st_dev:
        raise CompressError(
            f"--work-dir {work} and {out} are on different file systems", hint="put both on one: the artifact is moved by a rename"
        )
    return out, work


def _already_done(out: Path, mark: str, restart: bool, replace: bool) -> bool:
    if not out.exists():
        return False
    if not out.is_dir():
        raise CompressError(f"{out}: exists and is not a folder", hint="choose another -o")
    if not any(out.iterdir()):
        return False
    try:
        known = manifest.read(out)
    except CompressError as error:
        raise CompressError(f"{out}: exists and is not an artifact of compress", hint="choose another -o, or remove it") from error
    if not str(known.get("tool", "")).startswith(TOOL):
        raise CompressError(f"{out}: exists and was written by another tool", hint="choose another -o, or remove it")
    if restart or (replace and known.get("job") != mark):
        return False
    if known.get("job") != mark:
        raise CompressError(f"{out}: holds the result of another job", hint="--restart replaces it; or choose another -o")
    problems = manifest.check_files(out, known)
    if problems:
        raise CompressError(f"{out}: damaged ({problems[0]})", hint="--restart makes it again")
    return True


def _check_space(work: WorkDir, shards: list[Shard]) -> None:
    """Refuse to start what cannot be finished: hours are cheaper before than after."""
    need = sum(s.size for s in shards)
    have = sum(p.stat().st_blocks * 512 for p in work.artifact.iterdir() if p.is_file())
    free = shutil.disk_usage(work.path).free
    if need - have > free:
        raise CompressError(
            f"{work.path}: the artifact needs {(need - have) / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
            hint="free some space, or choose an -o on another disk",
        )


def _report(job: Job, out: Path, began: float, resumed: bool) -> Report:
    known = manifest.read(out)
    linears = known["linears"].values()
    weights = sum(entry["shape"][0] * entry["shape"][1] for entry in linears)
    bits = sum(entry["bits"] * entry["shape"][0] * entry["shape"][1] for entry in linears) / weights
    size = sum(f["bytes"] for name, f in known["files"].items() if name.endswith(".safetensors"))
    before = sum((job.folder / name).stat().st_size for name in job.view.reader.files())
    error = sum(entry["error"] for entry in linears) / len(linears)
    return Report(out, len(linears), bits, size, before, error, time.monotonic() - began, resumed)

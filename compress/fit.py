"""A job becomes an artifact: `quantize`, `prune`, `factorize`, and what they share."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compress import calibration, products
from compress.checkpoint import manifest, source, unpacked
from compress.checkpoint.writer import plan_shards
from compress.errors import CompressError
from compress.formats import lowrank_sparse
from compress.job import Asked, Job, prepare
from compress.pipeline import artifact, heads, memory
from compress.pipeline.choices import reducers
from compress.pipeline.estimate import Estimate, estimate, reverse_bytes, reverse_seconds
from compress.pipeline.places import TOOL, already_done, check_space, discard, discard_leftover, places
from compress.pipeline.resume import Lock, WorkDir, fingerprint, may_replace, tidy
from compress.running import Run

logger = logging.getLogger(__name__)


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
    zeros: float | None = None  # share of the pruned linears' weights, and of the whole model's
    zeros_model: float | None = None
    kept: float | None = None  # share of the factorized linears' parameters


def versions() -> dict[str, str]:
    """Versions that decide an artifact's bytes."""
    return {TOOL: metadata.version(TOOL), "torch": torch.__version__, "transformers": metadata.version("transformers")}


def quantize(
    model: str | Path, method: str, out: str | Path, *, dataset: str | Path | None = None, nsamples: int = 128,
    seqlen: int | None = None, device: str = "auto", resume: bool = True, **options: Any,
) -> Report:  # fmt: skip
    """Quantize a Hugging Face checkpoint, or a pruned artifact with its zeros kept, into the folder `out`.

    `options` are those of `job.Asked` and the method's own (`bits`, `group_size`, …). `layer_config` gives linears widths of
    their own ("re:.*down_proj=8"); `target_bpw` chooses those of the others from 2, 3, 4 and 8 bits, so that all linears take at
    most so many bits per weight and the measured loss is least; `lm_head_bits` (8 or 4) rounds embedding and head; `keep_zeros`
    treats a dense checkpoint's zeros as a pruned one's.
    An unfinished run of the same job is continued unless `resume=False`; the artifact appears under `out` by one rename, when it
    is whole.
    """
    common = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "device": device, "resume": resume}
    return _compress(model, method, Path(out), "quantize", _ask(common | options))


def prune(
    model: str | Path, method: str, out: str | Path, *, dataset: str | Path | None = None, nsamples: int = 128,
    seqlen: int | None = None, device: str = "auto", resume: bool = True, then_bits: int | None = None, then_method: str = "gptq",
    then_group_size: int = 128, **options: Any,
) -> Report:  # fmt: skip
    """Prune a Hugging Face checkpoint into the folder `out`; arguments as `quantize`.

    `sparsity` is the share of zeros in the linears, or with `of_model` in the whole model; `pattern` "N:M" keeps N of every M
    inputs. `domain_dataset` is the text of D-Pruner's domain. With `then_bits` the result is quantized by `then_method` with its
    zeros kept: the same bytes as `prune` and `quantize` one after the other, with the same `ignore`.
    """
    common = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "device": device, "resume": resume, **options}
    first, out, began = _ask(common), Path(out), time.monotonic()
    for name in ("layer_config", "target_bpw", "keep_zeros"):
        if getattr(first, name):
            raise CompressError(f"{name} is not an option of prune", hint="compress.quantize has it", usage=True)
    if then_bits is None:
        return _compress(model, method, out, "prune", first)
    first = dataclasses.replace(first, lm_head_bits=None, lm_head_only=False)
    job, second = _checked(model, method, "prune", first), _second(common, then_bits, then_group_size)
    then = _second_job(model, then_method, second, job)
    ready = _with_texts(job, first)
    calib = _calibrate(then, dataset, second) if then.needs_text else None
    out, work = places(out, None)
    between, begun = places(out.absolute().with_name(f"{out.absolute().name}.pruned.partial"), first.work_dir)
    facts = _facts(then, calib, None, second.seed, {})
    with Lock(work) as lock:  # over both steps
        replace = not resume or may_replace(begun, ready.mark)
        if not _holds_both(out, ready.mark, then, facts, replace, between.exists() or begun.exists()):
            resumed = _carry_out(ready, between, first)
            second = dataclasses.replace(second, resume=not replace)
            ready_then = _with_texts(_checked(between, then_method, "quantize", second), second)
            _carry_out(ready_then, out, second, lock, functools.partial(discard, between))
            return _report(ready.job, out, began, resumed)
        discard_leftover(between, ready.mark)
    tidy(work)
    return _report(ready.job, out, began, True)


def factorize(
    model: str | Path, method: str, out: str | Path, *, dataset: str | Path | None = None, nsamples: int = 128,
    seqlen: int | None = None, device: str = "auto", resume: bool = True, **options: Any,
) -> Report:  # fmt: skip
    """Factorize a Hugging Face checkpoint's linears into thin factors, and with `lost` whole columns; arguments as `quantize`.

    `keep` is the share of the linears' parameters that stays: in the whole model (`scope` "model", lost) or in every linear. With
    `then_bits` the factors are quantized, each with what it sees.
    """
    common = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "device": device, "resume": resume}
    return _compress(model, method, Path(out), "factorize", _ask(common | options))


def _ask(options: dict[str, Any]) -> Asked:
    """Common options and the method's own, told apart."""
    known = {f.name for f in dataclasses.fields(Asked)} - {"options"}
    common = {k: v for k, v in options.items() if k in known}
    for name in ("ignore", "layer_config"):
        common[name] = tuple(common.get(name) or ())
    asked = Asked(**common, options={k: v for k, v in options.items() if k not in known})
    if asked.states not in ("auto", "ram", "disk"):
        raise CompressError(f"--states {asked.states!r} is unknown", hint="use auto, ram or disk", usage=True)
    return asked


@dataclass(frozen=True, slots=True)
class _Ready:
    """A job with its texts read and its fingerprint known."""

    job: Job
    tokens: torch.Tensor | None
    domain: torch.Tensor | None
    facts: dict[str, Any]
    mark: str


def _second(options: dict[str, Any], bits: int, group_size: int) -> Asked:
    """What --then-bits asks of the quantization; `options` are the pruning's."""
    own = {"format", "work_dir", "domain_dataset", "of_model", "keep_zeros", "options"}
    passed = {f.name for f in dataclasses.fields(Asked)} - own
    return _ask({k: v for k, v in options.items() if k in passed} | {"bits": bits, "group_size": group_size})


def _second_job(model: str | Path, method: str, ask: Asked, first: Job) -> Job:
    """The quantization after the pruning `first`, checked before anything is pruned."""
    facts = {t.name: {"kind": t.kind, "params": t.params, "mask_sha256": None} for t in first.layout.targets.values()}
    try:
        return prepare(model, method, "quantize", ask, unpacked.sparsity({"linears": facts}))
    except CompressError as error:
        hint = (error.hint or "").replace("--group-size", "--then-group-size")
        if hint == "use --no-rotate":
            hint = "without --then-bits, then compress quantize with that option"
        raise CompressError(f"--then-bits {ask.options['bits']}: {error.message}", hint=hint, usage=error.exit_code == 2) from error


def _checked(model: str | Path, method: str, verb: str, ask: Asked) -> Job:
    """A job held to everything that is known before its texts are read."""
    job = prepare(model, method, verb, ask)
    wanted = bool(getattr(job.method, "DOMAIN", False))
    if wanted != (ask.domain_dataset is not None):
        raise CompressError(
            f"{job.method_name} needs --domain-dataset" if wanted else f"--domain-dataset means nothing to {job.method_name}",
            hint="a .txt, .jsonl or .parquet file of the domain" if wanted else "use -m dpruner, or --dataset", usage=True,
        )  # fmt: skip
    return job


def _with_texts(job: Job, ask: Asked) -> _Ready:
    """Read the job's texts and take its fingerprint."""
    calib = _calibrate(job, ask.dataset, ask) if job.needs_text else None
    domain = None if ask.domain_dataset is None else _calibrate(job, ask.domain_dataset, ask, domain=True)
    facts = _facts(job, calib, domain, ask.seed)
    tokens = None if calib is None else calib.tokens
    return _Ready(job, tokens, None if domain is None else domain.tokens, facts, _mark(job, facts))


def _compress(model: str | Path, method: str, out: Path, verb: str, ask: Asked) -> Report:
    """One job from its arguments to its report."""
    began = time.monotonic()
    ready = _with_texts(_checked(model, method, verb, ask), ask)
    resumed = _carry_out(ready, out, ask)
    return _report(ready.job, out, began, resumed)


def _carry_out(
    ready: _Ready, out: Path, ask: Asked, lock: Lock | None = None, then: Callable[[], None] = lambda: None
) -> bool:  # fmt: skip
    """Make the artifact, or find it made; whether something was there already. `then` runs when it is at its place.

    `lock` is that of the work folder, where it is held already.
    """
    job, mark = ready.job, ready.mark
    out, work_path = places(out, ask.work_dir)
    replace = not ask.resume or may_replace(work_path, mark)
    if already_done(out, mark, not ask.resume, replace):
        if ask.work_dir is None:
            tidy(work_path)
        logger.info("%s is already there, made by the same job (--restart makes it again)", out)
        then()
        return True
    work = WorkDir(work_path, mark, restart=not ask.resume, lock=lock)
    resumed = work.done > 0 or any((work.path / part).exists() for part in ("reverse", "survey"))
    run = Run(job, ask, work, ready.tokens, ready.domain)
    try:
        check_space(work, plan_shards(job.layout.plan, job.max_shard), run.spooled)
        with memory.long_run(), products.faster():
            run.all()
        _finish(run.job, work, {**ready.facts, "job": mark, "format": job.format})
        work.publish(out, ask.work_dir is not None, replace, then)
    finally:
        work.close()
    return resumed


def _holds_both(out: Path, pruned: str, then: Job, facts: dict[str, Any], replace: bool, busy: bool) -> bool:
    """Whether `out` is what `then` makes of the pruning job with the fingerprint `pruned`.

    Another artifact there is an error, unless it may be replaced or the work has begun (`busy`) and will look itself.
    """
    mark = ""
    if (out / manifest.FILE).is_file():
        known = manifest.read(out)
        if known["source"].get("pruned", {}).get("job") == pruned:
            mark = _mark(then, {**facts, "source": known["source"], "extra": known["extra"]})
        if busy and (replace or known.get("job") != mark):
            return False
    return already_done(out, mark, replace, replace)


def _mark(job: Job, facts: dict[str, Any]) -> str:
    """The job's fingerprint: everything that decides the bytes."""
    settings = {"format": job.format, "batch": job.batch_size, "device": job.device.split(":")[0], "ignore": list(job.ignore)}
    head = {} if job.head is None else {"lm_head": list(job.head)}
    return fingerprint({**facts, **settings, "shard": job.max_shard, **head})


def _finish(job: Job, work: WorkDir, facts: dict[str, Any]) -> None:
    """Everything beside the shards, the manifest last."""
    artifact.write_companions(
        job.folder, work.artifact, job.layout, job.skeleton, job.method_name, job.name, job.view.untied
    )  # fmt: skip
    made = {key: work.state[key] for key in ("linears", "heads", "search") if key != "heads" or work.state[key]}
    artifact.write_manifest(work.artifact, {**facts, **made})


def dry_run(model: str | Path, method: str, *, verb: str = "quantize", **options: Any) -> Estimate:
    """Predict an artifact's size, the peak memory and the time from headers alone; reads no weight. Options as the verb's."""
    then_bits, then_method, then_group_size = None, "gptq", 128
    if verb == "prune":  # a factorization quantizes in the same step: its own options
        then_bits = options.pop("then_bits", None)
        then_method, then_group_size = options.pop("then_method", then_method), options.pop("then_group_size", then_group_size)
    ask = _ask(options if then_bits is None else options | {"lm_head_bits": None, "lm_head_only": False})  # the quantization's
    job = prepare(model, method, verb, ask)
    first = _estimate(job, ask)
    if then_bits is None:
        return first
    second = _second(options, then_bits, then_group_size)
    then = _estimate(_second_job(model, then_method, second, job), second)
    peak, halves = max(first.peak_memory, then.peak_memory), all(t.dtype != "F32" for t in job.layout.targets.values())
    return dataclasses.replace(then, peak_memory=peak, seconds=first.seconds + then.seconds, exact=then.exact and halves)


def _estimate(job: Job, ask: Asked) -> Estimate:
    """What one job will cost."""
    size = sum(s.size for s in plan_shards(job.layout.plan, job.max_shard))
    tokens = job.nsamples * job.expand * (job.seqlen or 0) if job.observes or job.survey_observes else 0
    windows = (tokens, job.batch_size, job.seqlen or 0)
    found = estimate(job.skeleton, job.view, job.layout, job.method, job.config, size, *windows, job.dtype, ask.states)
    found = dataclasses.replace(found, seconds=found.seconds + heads.seconds(job.layout.heads.values()))
    makers = reducers(job.method, job.config, job.layout, job.widths)
    exact = ask.target_bpw is None and getattr(job.config, "scope", "tensor") != "global" and not _settles_sizes(job)
    if not makers or job.seqlen is None:
        return dataclasses.replace(found, exact=exact)
    trains = job.schedule is not None
    peak = reverse_bytes(job.skeleton, job.view, len(makers), job.samples, job.seqlen, job.dtype, ask.states, trains)
    seconds = reverse_seconds(job.layout, job.samples * job.seqlen, 4 if ask.target_bpw is not None else 0)
    seconds *= 1.5 * job.schedule.epochs if job.schedule is not None else 1.0
    peak = max(found.peak_memory, peak)
    return dataclasses.replace(found, peak_memory=peak, seconds=found.seconds + seconds, exact=exact)


def _settles_sizes(job: Job) -> bool:
    """Whether a survey decides how much each linear takes, of which only the total is known."""
    return job.surveys and hasattr(job.method, "settle") and getattr(job.method, "VERB", "") == "factorize"


def _calibrate(job: Job, dataset: str | Path | None, ask: Asked, domain: bool = False) -> calibration.Calibration:
    """The windows of a job's text, or of its domain's."""
    assert job.seqlen is not None
    tokenizer = calibration.load_tokenizer(job.folder, ask.trust_remote_code)
    vocab = job.skeleton.model.get_input_embeddings().num_embeddings
    count, option = (job.samples, "--domain-dataset") if domain else (job.nsamples, "--dataset")
    return calibration.load(dataset, tokenizer, nsamples=count, seqlen=job.seqlen, seed=ask.seed, vocab=vocab, option=option)


def _facts(
    job: Job, calib: calibration.Calibration | None, domain: calibration.Calibration | None, seed: int | None,
    origin: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest's provenance, known before the work starts; `origin` stands for the source where its files are not there yet."""
    return {
        "tool": f"{TOOL} {metadata.version(TOOL)}",
        "source": origin if origin is not None else {
            "name": job.name,
            "revision": source.revision(job.folder),
            "files": source.hashes(job.folder, job.view.reader.files()),
            "weight_bytes": sum(e.nbytes for e in job.view.reader.entries.values()),
            **job.history,
        },
        "method": job.method_name,
        "config": dataclasses.asdict(job.config),
        "seed": seed,
        "calibration_sha256": calib.sha256 if calib is not None else None,
        **({"domain_sha256": domain.sha256} if domain is not None else {}),
        "versions": versions() | ({"scipy": metadata.version("scipy")} if job.widths.target is not None else {}),
        "extra": job.view.extra,
        **job.widths.record(),
    }


def _report(job: Job, out: Path, began: float, resumed: bool) -> Report:
    known = manifest.read(out)
    linears = known["linears"].values()
    weights = sum(entry["shape"][0] * entry["shape"][1] for entry in linears)
    bits = sum(entry["bits"] * entry["shape"][0] * entry["shape"][1] for entry in linears) / weights
    size = sum(f["bytes"] for name, f in known["files"].items() if name.endswith(".safetensors"))
    before = sum((job.folder / name).stat().st_size for name in job.view.reader.files())
    error = sum(entry["error"] for entry in linears) / len(linears)
    zeros = sum((1 - e.get("density", 1.0)) * e["shape"][0] * e["shape"][1] for e in linears)
    total = sum(torch.Size(job.view.shape(n)).numel() for n in job.view.names)
    pruned = any("density" in e for e in linears)
    values = sum(lowrank_sparse.parameters(e["params"], e["shape"]) for e in linears if "rank" in e["params"])
    shares = (zeros / weights if pruned else None, zeros / total if pruned else None, values / weights if values else None)
    return Report(out, len(linears), bits, size, before, error, time.monotonic() - began, resumed, *shares)

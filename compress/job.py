"""Arguments become a job: every option checked against the checkpoint's headers, nothing computed yet."""

from __future__ import annotations

import dataclasses
import logging
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from compress import calibration, devices, registry
from compress.checkpoint import dtypes, source, unpacked
from compress.checkpoint.writer import MAX_SHARD
from compress.errors import CompressError, nearest
from compress.models import rotate
from compress.models.head import Head
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView
from compress.pipeline import layout
from compress.pipeline.choices import WIDTH_SAMPLES, Choices, Widths, reducers
from compress.types import Progress, Schedule, Sparsity

logger = logging.getLogger(__name__)
_BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """Options that every verb shares, as the user gave them; `options` are the method's own."""

    dataset: str | Path | None = None
    domain_dataset: str | Path | None = None
    nsamples: int = 128
    seqlen: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    format: str | None = None
    ignore: tuple[str, ...] = ()
    layer_config: tuple[str, ...] = ()
    target_bpw: float | None = None
    lm_head_bits: int | None = None
    lm_head_only: bool = False
    keep_zeros: bool = False
    of_model: bool = False
    states: str = "auto"
    work_dir: str | Path | None = None
    resume: bool = True
    max_shard_size: int = MAX_SHARD
    trust_remote_code: bool = False
    progress: Callable[[Progress], None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


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
    history: Mapping[str, Any] = field(default_factory=dict)  # of a pruned source, for the manifest
    head: tuple[int, bool] | None = None  # `layout.HeadChoice`

    def planned(self, choices: Choices) -> Job:
        """The same job with format params that its linears were given."""
        mixed = self.widths.asked
        plan = layout.make(self.skeleton, self.view, self.config, self.format, self.ignore, choices, mixed, self.head)
        return dataclasses.replace(self, layout=plan)

    @property
    def needs_text(self) -> bool:
        """Whether the job reads calibration text."""
        if self.survey_observes or self.observes or self.widths.target is not None:
            return True
        return bool(self.method.CALIBRATED) and not getattr(self.method, "DOMAIN", False)

    @property
    def observes(self) -> bool:
        """Whether text runs through the blocks while they are compressed."""
        own = getattr(self.method, "observes", None)
        return bool(self.method.CALIBRATED if own is None else own(self.config))

    @property
    def survey_observes(self) -> bool:
        """Whether text runs through the blocks in that walk."""
        own = getattr(self.method, "survey_observes", None)
        return self.surveys and hasattr(self.method, "survey_collects") and (own is None or bool(own(self.config)))

    @property
    def surveys(self) -> bool:
        """Whether the method walks over the blocks once before it compresses them."""
        return bool(self.method.surveys(self.config)) if hasattr(self.method, "surveys") else False

    @property
    def schedule(self) -> Schedule | None:
        """How the method trains while gradients are taken, if it does."""
        found: Schedule | None = self.method.training(self.config) if hasattr(self.method, "training") else None
        return found

    @property
    def samples(self) -> int:
        """Calibration windows that gradients are taken from, the first ones."""
        return min(self.nsamples, int(getattr(self.config, "samples", WIDTH_SAMPLES)))

    @property
    def expand(self) -> int:
        """Shifted copies of the calibration windows."""
        return int(getattr(self.config, "expand", 1))


def make_config(method: ModuleType, options: Mapping[str, Any]) -> Any:
    """The method's Config from keyword options; an unknown one is answered with the nearest."""
    known = [f.name for f in dataclasses.fields(method.Config)]
    hints = typing.get_type_hints(method.Config)
    for key, value in options.items():
        if key not in known:
            raise CompressError(f"unknown option {key!r}", hint=nearest(key, known), usage=True)
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise CompressError(f"{key} is {value!r}, wanted {wanted}", hint="its default is right for most", usage=True)
    return method.Config(**options)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an option's type; an int is a float too, a bool is neither."""
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return any(isinstance(value, (int, float) if kind is float else kind) for kind in kinds)


def _scale_to_model(config: Any, plan: layout.Layout, view: CheckpointView) -> Any:
    """The config with its share of zeros, given of the whole model, made that of the linears."""
    linears = sum(t.shape[0] * t.shape[1] for t in plan.targets.values())
    total = sum(torch.Size(view.shape(n)).numel() for n in view.names)
    if config.pattern:
        raise CompressError("--of-model goes with --sparsity, a pattern has its own", hint="drop one of them", usage=True)
    asked = config.share
    share = asked * total / linears
    if share > 1:
        raise CompressError(
            f"--sparsity {asked} of the model is {share:.2f} of its linears, which hold {linears / total:.1%} of its weights",
            hint=f"at most --sparsity {math.floor(1e4 * linears / total) / 1e4} with --of-model", usage=True,
        )  # fmt: skip
    logger.info("%.4g of the whole model: %.4f of the linears", asked, share)
    return dataclasses.replace(config, sparsity=share)


def _warn_of_size(plan: layout.Layout, view: CheckpointView) -> None:
    """Say so where compressed linears would be larger than the dense ones (wrappers of a small matrix, a tiny share of zeros)."""
    if plan.name == layout.DENSE:
        return
    kept = [f"{t.name}.weight" for t in plan.targets.values()]
    before = sum(torch.Size(view.shape(n)).numel() * dtypes.itemsize(view.dtype(n)) for n in kept)
    after = sum(p.nbytes for p in plan.plan if p.name.rpartition(".")[0] in plan.targets and not p.name.endswith(".bias"))
    if after > before:
        hint = ", a smaller --block" if "b_in" in next(iter(plan.targets.values())).params else ""
        logger.warning("the compressed linears take %.2f of the dense ones' bytes: use --format dense%s", after / before, hint)


def _head(verb: str, ask: Asked) -> layout.HeadChoice | None:
    """What was asked for embedding and head."""
    if ask.lm_head_bits is None:
        if ask.lm_head_only:
            raise CompressError("--lm-head-only goes with --lm-head-bits", hint="add --lm-head-bits 8", usage=True)
        return None
    if verb == "prune":  # a quantization after it takes the option
        raise CompressError("--lm-head-bits goes with --then-bits here", hint="add --then-bits 4", usage=True)
    return ask.lm_head_bits, ask.lm_head_only


def prepare(model: str | Path, method: str, verb: str, ask: Asked, pruned: Mapping[str, Sparsity] | None = None) -> Job:
    """Check every option against the checkpoint's headers.

    `pruned` is what will be known of the checkpoint's zeros once it has been pruned, where that is still to be done.
    """
    module = registry.load("methods", method)
    made_by = registry.verb(method)
    if made_by != verb:
        why = f"{method} is a method of compress {made_by}, not of {verb}"
        raise CompressError(why, hint=f"compress {made_by} MODEL -m {method}", usage=True)
    config = make_config(module, ask.options)
    form = layout.pick(verb, ask.format)
    folder = source.resolve(model)
    known = unpacked.read(folder)
    hf_config = load_config(folder, ask.trust_remote_code, compressed=known is not None)
    rotation = module.transform(config) if hasattr(module, "transform") else None
    skeleton, view = rotate.open_model(folder, hf_config, rotation, ask.trust_remote_code, ask.keep_zeros or bool(pruned), known)
    view.sparsity = view.sparsity if pruned is None else pruned
    if any(s.wrapped for s in view.sparsity.values()) and not (getattr(module, "CORES", False) and form != layout.DENSE):
        raise CompressError(
            f"{folder}: an armor artifact, of which only the cores can be quantized, by gptq, rsq --no-rotate or rtn, and packed",
            hint="-m gptq without --format", usage=True,
        )  # fmt: skip
    widths = Widths(ask.layer_config, ask.target_bpw)
    if widths.target is not None and any(s.wrapped for s in view.sparsity.values()):
        raise CompressError("--target-bpw cannot measure armor's cores", hint="use --layer-config", usage=True)
    head = _head(verb, ask)
    plan = layout.make(skeleton, view, config, form, ask.ignore, None, widths.asked, head)
    if ask.of_model:
        config = _scale_to_model(config, plan, view)
        plan = layout.make(skeleton, view, config, form, ask.ignore, None, widths.asked, head)
    device = devices.pick(ask.device)
    half = device != "cpu" and all(t.dtype == "BF16" for t in plan.targets.values())
    calibrated = module.CALIBRATED or ask.target_bpw is not None or bool(getattr(config, "recover", 0))
    length = calibration.pick_seqlen(ask.seqlen, hf_config) if calibrated else ask.seqlen
    if ask.batch_size is not None and ask.batch_size < 1:
        raise CompressError(f"--batch-size {ask.batch_size} is not a number of windows", hint="use 1 or more", usage=True)
    batch = ask.batch_size or max(1, _BATCH_TOKENS // (length or _BATCH_TOKENS))
    name = folder.resolve().name if Path(model).is_dir() else str(model).rsplit("/", 1)[-1]
    history = unpacked.history(known)
    job = Job(
        folder, history.pop("name", name), method.replace("-", "_").lower(), module, config, skeleton, view, plan, device,
        torch.bfloat16 if half else torch.float32, batch, ask.nsamples, length, ask.max_shard_size, form, ask.ignore, widths,
        history, head,
    )  # fmt: skip
    widths.check(plan)
    if plan.embedding is not None and plan.guarded and form == layout.QUANTIZED:
        logger.warning("rounded so, the embedding is read by compress alone; --format dense%s loads anywhere",
                       "" if len(plan.heads) == 1 else ", or --lm-head-only with symmetric linears,")  # fmt: skip
    for linear in plan.left:
        logger.warning("%s stays dense: compressed-tensors 0.20 cannot read 4-bit zero-points of so few outputs", linear)
    _warn_of_size(plan, view)
    if reducers(module, config, plan, widths):
        Head(skeleton, view, job.dtype)  # refuses what gradients do not know, before anything is read
        if not job.observes and not job.surveys:  # no other window would be looked at
            job = dataclasses.replace(job, nsamples=job.samples)
    return job.planned(widths.guess(plan))

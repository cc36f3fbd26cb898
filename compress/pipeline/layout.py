"""How an artifact is laid out: which tensors it will hold, known from headers alone, and how a packed linear becomes them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress import registry
from compress.checkpoint import dtypes
from compress.checkpoint.writer import Planned
from compress.errors import CompressError, nearest
from compress.formats import int_grouped
from compress.models.skeleton import Skeleton
from compress.models.view import CheckpointView
from compress.types import Packed

logger = logging.getLogger(__name__)
Choices = Mapping[str, Mapping[str, Any]]  # full name of a linear -> format params that replace the config's
LAYOUTS = {"pack-quantized": "int_grouped", "awq": "awq", "dense": "dense"}


@dataclass(frozen=True, slots=True)
class Target:
    """One linear to compress."""

    name: str  # full module name
    shape: tuple[int, int]  # (O, I)
    transposed: bool  # the model stores (I, O)
    dtype: str  # safetensors dtype of the source weight
    params: Mapping[str, Any]  # of the format that the method packs it in


@dataclass(frozen=True)
class Layout:
    """The plan of one artifact."""

    name: str
    packs: str  # kind of the linears that the method returns
    targets: dict[str, Target]
    plan: tuple[Planned, ...]
    guarded: bool  # stock loaders must refuse it
    cast: str | None  # dtype that every other float tensor is cast to
    left: tuple[str, ...] = ()  # linears that stay dense because a stock loader could not read them

    @property
    def kind(self) -> str:
        """Kind of the linears in the artifact, as the manifest names it."""
        return self.packs if self.name == "pack-quantized" else LAYOUTS[self.name]

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in; all targets have one."""
        dtype = next(iter(self.targets.values())).dtype
        module = registry.by_kind(self.packs)
        own: str = module.value_dtype(dtype) if hasattr(module, "value_dtype") else dtype
        return torch.float16 if self.name == "awq" else dtypes.TORCH[own]

    def tensors(self, target: Target, packed: Packed) -> dict[str, torch.Tensor]:
        """Full names and tensors of one packed linear, as this layout writes them."""
        if self.name == "dense":
            W = dense(packed).to(dtypes.TORCH[target.dtype])
            return {f"{target.name}.weight": W.T.contiguous() if target.transposed else W}
        if self.name != "pack-quantized":
            q, scale, zero = int_grouped.unpack(packed)
            module = registry.load("formats", LAYOUTS[self.name])
            packed = module.pack(q, scale, zero, bits=packed.params["bits"], group_size=packed.params["group_size"])
        return {f"{target.name}.{suffix}": t for suffix, t in packed.tensors.items()}

    def packed(self, target: Target, read: Callable[[str], torch.Tensor]) -> Packed:
        """The reverse of `tensors` but for dense: a linear read back from its tensors."""
        module = registry.by_kind(self.kind)
        suffixes = module.spec(target.params, target.shape, target.dtype)
        tensors = {s: read(f"{target.name}.{s}") for s in suffixes}
        found = Packed(module.KIND, module.VERSION, target.params, tensors, target.shape)
        return module.to_int_grouped(found) if self.name == "awq" else found


def dense(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I) of a packed linear, fp32."""
    W: torch.Tensor = registry.by_kind(packed.kind).dequantize(packed)
    return W


def matcher(patterns: tuple[str, ...], option: str = "--ignore") -> Callable[[str], list[str]]:
    """A function that returns the patterns (`re:…` or a full name) that a module name matches; `option` gave them."""
    compiled: list[tuple[str, re.Pattern[str]]] = []
    for pattern in patterns:
        try:
            text = pattern.removeprefix("re:") if pattern.startswith("re:") else re.escape(pattern)
            compiled.append((pattern, re.compile(text)))
        except re.error as error:
            raise CompressError(
                f"{option} {pattern!r} is not a regular expression ({error})", hint="quote it", usage=True
            ) from error
    return lambda name: [p for p, c in compiled if c.fullmatch(name)]


def make(
    skeleton: Skeleton, view: CheckpointView, config: Any, layout: str, ignore: tuple[str, ...], choices: Choices | None = None,
    mixed: bool = False,
) -> Layout:  # fmt: skip
    """Plan an artifact from headers alone. Refuses linears that the method's config cannot hold.

    `choices` replaces format params of some linears, by full name; `mixed` says that they may change widths.
    """
    if layout not in LAYOUTS:
        raise CompressError(f"--format {layout!r} is unknown", hint=nearest(layout, list(LAYOUTS)), usage=True)
    packs = getattr(config, "kind", int_grouped.KIND)
    own = layout == "pack-quantized" and packs != int_grouped.KIND
    if layout == "awq" and packs != int_grouped.KIND:
        raise CompressError(f"--format awq cannot hold {packs}", hint="use --format pack-quantized or dense", usage=True)
    targets = _targets(skeleton, view, config, ignore, choices or {})
    left = [t.name for t in targets.values() if layout == "pack-quantized" and not own and _unreadable(t, mixed)]
    for name in left:
        del targets[name]
    if not targets:
        raise CompressError("every linear is ignored: nothing to compress", hint="drop an --ignore", usage=True)
    conv1d = any(t.transposed for t in targets.values())
    if layout == "awq" and conv1d:
        raise CompressError("--format awq cannot hold transposed Conv1D layers (GPT-2)", hint="use the default format", usage=True)
    cast = "F16" if layout == "awq" else None
    module = registry.by_kind(packs if own else LAYOUTS[layout])
    plan: list[Planned] = []
    for name in view.names:
        target = targets.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        dtype = view.dtype(name)
        if target is None:
            plan.append(Planned(name, cast if cast and dtype in dtypes.FLOATS else dtype, view.shape(name)))
        elif layout == "dense":
            plan.append(Planned(name, dtype, view.shape(name)))
        else:
            spec = module.spec(target.params, target.shape, dtype)
            plan += [Planned(f"{target.name}.{suffix}", d, shape) for suffix, (d, shape) in spec.items()]
    guarded = own or (layout == "pack-quantized" and (conv1d or _mixed(targets)))
    return Layout(layout, packs, targets, tuple(plan), guarded, cast, tuple(left))


def _mixed(targets: Mapping[str, Target]) -> bool:
    """Whether stock transformers would read linears of several widths with one of them, without an error.

    Asymmetric ones it dequantizes at load, by one group of the config (5.24, `integrations/compressed_tensors.py:
    get_dense_scheme`).
    """
    return len({t.params["bits"] for t in targets.values()}) > 1 and not all(t.params["symmetric"] for t in targets.values())


def _unreadable(target: Target, mixed: bool) -> bool:
    """A single word row of packed 4-bit zero-points: compressed-tensors 0.20 fails on it, so we do not write it.

    Where widths are mixed such a linear stays dense at any width, so that what is compressed does not depend on the choice.
    """
    params, shape = target.params, target.shape
    four = mixed or params["bits"] == 4
    return four and not params["symmetric"] and shape[0] <= 8 and int_grouped.groups(params, shape) > 1


def _targets(
    skeleton: Skeleton, view: CheckpointView, config: Any, ignore: tuple[str, ...], choices: Choices
) -> dict[str, Target]:  # fmt: skip
    ignored = matcher(ignore)
    hits: set[str] = set()
    conv1d = skeleton.conv1d_weights
    targets: dict[str, Target] = {}
    for index in range(len(skeleton.blocks)):
        for relative, shape in skeleton.linears(index).items():
            name = skeleton.prefix(index) + relative
            found = ignored(name)
            if found:
                hits.update(found)
                continue
            dtype = view.dtype(f"{name}.weight")
            if dtype not in ("F32", "F16", "BF16"):
                raise CompressError(
                    f"{name}: weights of type {dtype} cannot be compressed",
                    hint="start from a 16-bit or 32-bit checkpoint",
                )
            config.check(name, shape)
            params = {**config.params(shape), **choices.get(name, {})}
            targets[name] = Target(name, shape, f"{name}.weight" in conv1d, dtype, params)
    unused = [p for p in ignore if p not in hits]
    if unused:
        raise CompressError(
            f"--ignore {unused[0]!r} matches no linear", hint="names look like " + next(iter(targets), "?"), usage=True
        )
    first = next(iter(targets.values()), None)
    odd = next((t for t in targets.values() if first is not None and t.dtype != first.dtype), None)
    if odd is not None and first is not None:
        raise CompressError(
            f"{odd.name}: stored as {odd.dtype}, {first.name} as {first.dtype}",
            hint=f"--ignore {odd.name}, or save the checkpoint in one dtype",
        )
    return targets

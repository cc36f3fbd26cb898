"""How an artifact is laid out: which tensors it will hold, known from headers alone, and how a packed linear becomes them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress import registry
from compress.checkpoint import dtypes
from compress.checkpoint.writer import Planned
from compress.errors import CompressError, nearest
from compress.formats import armor, bitmask, int_grouped, sparse24, sparse24_int
from compress.models.skeleton import Skeleton
from compress.models.view import CheckpointView
from compress.types import Packed, Sparsity, Wrappers

logger = logging.getLogger(__name__)
Choices = Mapping[str, Mapping[str, Any]]  # full name of a linear -> format params that replace the config's
QUANTIZED, SPARSE, FACTORS, AWQ, DENSE = "pack-quantized", "sparse", "factors", "awq", "dense"
HEAD_BITS = (8, 4)
HeadChoice = tuple[int, bool]  # bits of the head, and whether an untied embedding stays as it is
EXACT = (sparse24.KIND, bitmask.KIND, armor.KIND)  # kinds that hold fp32 values, too, while they are on the way to dense weights
# of a verb, its own first
LAYOUTS = {"quantize": (QUANTIZED, AWQ, DENSE), "prune": (SPARSE, DENSE), "factorize": (FACTORS, DENSE)}


@dataclass(frozen=True, slots=True)
class Target:
    """One linear to compress."""

    name: str  # full module name
    shape: tuple[int, int]  # (O, I)
    transposed: bool  # the model stores (I, O)
    dtype: str  # safetensors dtype of the source weight
    params: Mapping[str, Any]  # of the format, the artifact's and the method's
    kind: str  # of the linear in the artifact


@dataclass(frozen=True)
class Layout:
    """The plan of one artifact."""

    name: str
    packs: str  # kind of the linears that the method returns
    targets: dict[str, Target]
    plan: tuple[Planned, ...]
    guarded: bool  # stock loaders must refuse it
    cast: str | None  # dtype that every other float tensor is cast to
    wrappers: Callable[[str], Wrappers]  # of linears whose kind is armor and whose method packs the core
    left: tuple[str, ...] = ()  # linears that stay dense because a stock loader could not read them
    heads: Mapping[str, Target] = field(default_factory=dict)  # embedding and head, where they are rounded (`_heads`)
    embedding: str | None = None  # which of them is the embedding

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales, or the values that stay, are stored in; all targets have one."""
        dtype = next(iter(self.targets.values())).dtype
        if self.name == DENSE and self.packs in EXACT:
            return dtypes.TORCH[dtype]
        module = registry.by_kind(self.packs)
        own: str = module.value_dtype(dtype) if hasattr(module, "value_dtype") else dtype
        return torch.float16 if self.name == AWQ else dtypes.TORCH[own]

    def tensors(self, target: Target, packed: Packed) -> dict[str, torch.Tensor]:
        """Full names and tensors of one packed linear, as this layout writes them."""
        if target.kind == "dense":
            W = dense(packed).to(dtypes.TORCH[target.dtype])
            return {f"{target.name}.weight": W.T.contiguous() if target.transposed else W}
        if target.kind != self.packs:
            wrappers = self.wrappers(target.name) if target.kind == armor.KIND else ()
            packed = registry.by_kind(target.kind).from_int_grouped(packed, target.params, *wrappers)
        return {f"{target.name}.{suffix}": t for suffix, t in packed.tensors.items()}

    def packed(self, target: Target, read: Callable[[str], torch.Tensor]) -> Packed:
        """The reverse of `tensors` but for dense: a linear read back from its tensors."""
        module = registry.by_kind(target.kind)
        suffixes = module.spec(target.params, target.shape, target.dtype)
        tensors = {s: read(f"{target.name}.{s}") for s in suffixes}
        found = Packed(module.KIND, module.VERSION, target.params, tensors, target.shape)
        back: Packed = found if target.kind == self.packs else module.to_int_grouped(found)
        return back


def pick(verb: str, name: str | None) -> str:
    """The layout of a verb by its name; its own where none is given."""
    known = LAYOUTS[verb]
    if name is None:
        return known[0]
    if name not in known:
        raise CompressError(f"--format {name!r} is unknown to {verb}", hint=nearest(name, list(known)), usage=True)
    return name


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
    mixed: bool = False, head: HeadChoice | None = None,
) -> Layout:  # fmt: skip
    """Plan an artifact from headers alone. Refuses linears that the method's config cannot hold.

    `choices` replaces format params of some linears, by full name; `mixed` says that they may change widths. `head` rounds
    the head, and the embedding.
    """
    packs = getattr(config, "kind", int_grouped.KIND)
    if layout == AWQ and packs != int_grouped.KIND:
        raise CompressError(f"--format awq cannot hold {packs}", hint=f"use --format {QUANTIZED} or dense", usage=True)
    targets = _targets(skeleton, view, config, ignore, choices or {}, layout, packs)
    left = [t.name for t in targets.values() if layout == QUANTIZED and t.kind == int_grouped.KIND and _unreadable(t, mixed)]
    for name in left:
        del targets[name]
    if not targets:
        raise CompressError("every linear is ignored: nothing to compress", hint="drop an --ignore", usage=True)
    conv1d = any(t.transposed for t in targets.values())
    if layout == AWQ and conv1d:
        raise CompressError("--format awq cannot hold transposed Conv1D layers (GPT-2)", hint="use the default format", usage=True)
    heads, embedding = ({}, None) if head is None else _heads(skeleton, view, config, layout, head)
    cast = "F16" if layout == AWQ else None
    plan: list[Planned] = []
    every = {**targets, **heads}
    for name in view.names:
        target = every.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        dtype = view.dtype(name)
        if target is None:
            plan.append(Planned(name, cast if cast and dtype in dtypes.FLOATS else dtype, view.shape(name)))
        elif layout == DENSE:
            plan.append(Planned(name, dtype, view.shape(name)))
        else:
            spec = registry.by_kind(target.kind).spec(target.params, target.shape, dtype)
            plan += [Planned(f"{target.name}.{suffix}", d, shape) for suffix, (d, shape) in spec.items()]
    own = any(t.kind not in (int_grouped.KIND, "awq", "dense") for t in targets.values())
    tied = embedding is not None and len(heads) == 1
    guarded = own or (layout == QUANTIZED and (conv1d or tied or _mixed(every, embedding is not None)))
    return Layout(layout, packs, targets, tuple(plan), guarded, cast, view.wrappers, tuple(left), heads, embedding)


def _heads(
    skeleton: Skeleton, view: CheckpointView, config: Any, layout: str, head: HeadChoice
) -> tuple[dict[str, Target], str | None]:  # fmt: skip
    """Embedding, then head, as targets, by the modules under whose names their weights lie, one where they are tied; the embedding.

    Groups are the linears'; those below 32 would cost more in scales than they gain here. Where stock loaders can read the artifact
    symmetry is theirs too; else it is what loses least (docs/log.md): 8 bits symmetric, 4 bits not.
    """
    bits, only = head
    if bits not in HEAD_BITS:
        raise CompressError(f"--lm-head-bits {bits} is not supported", hint="use 8 or 4", usage=True)
    if layout == AWQ:
        raise CompressError("--format awq keeps the head dense", hint=f"use --format {QUANTIZED}, or no --lm-head-bits", usage=True)
    model, names = skeleton.model, {id(m): n for n, m in skeleton.model.named_modules()}
    table, last = (names.get(id(m), "") for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    pair = (table, nn.Embedding), (last, nn.Linear)
    if not all(name and isinstance(model.get_submodule(name), kind) for name, kind in pair):
        what = f"model family {skeleton.config.model_type!r} has no ordinary embedding and head"
        raise CompressError(f"--lm-head-bits: {what}", hint="leave it out", usage=True)
    tied = f"{last}.weight" not in view.names
    if tied and only:
        raise CompressError("--lm-head-only: embedding and head are one tensor here", hint="leave it out", usage=True)
    size = int(getattr(config, "group_size", getattr(config, "then_group_size", -1)))
    theirs = bool(getattr(config, "symmetric", True))
    alike = bits == getattr(config, "bits", None) and not 0 < size < 32
    portable = getattr(config, "kind", int_grouped.KIND) == int_grouped.KIND and not tied and (alike or (only and theirs))
    found: dict[str, Target] = {}
    for name in (*(() if only else (table,)), *(() if tied else (last,))):
        shape, dtype = view.shape(f"{name}.weight"), view.dtype(f"{name}.weight")
        group = 32 if 0 < size < 32 and shape[1] % 32 == 0 else size
        if dtype not in ("F32", "F16", "BF16") or (group != -1 and shape[1] % group):
            why = f"its {shape[1]} columns ({dtype}) cannot be rounded in groups of {group}"
            raise CompressError(f"--lm-head-bits: {name}: {why}", hint="use --group-size -1, or leave it out", usage=True)
        params = {"bits": bits, "group_size": group, "symmetric": theirs if portable else bits == 8}
        found[name] = Target(name, (shape[0], shape[1]), False, dtype, params, DENSE if layout == DENSE else int_grouped.KIND)
    return found, None if only else table


def _kind(layout: str, packs: str, source: Sparsity | None) -> tuple[str, dict[str, Any]]:
    """Kind of a linear in the artifact, and format params that the source's own sparsity adds."""
    if layout in (AWQ, DENSE):
        return layout, {}
    if packs == int_grouped.KIND and source is not None and source.pattern is not None:
        n, m = source.pattern
        if source.wrapped is not None:
            b_in, b_out = source.wrapped
            return armor.KIND, {"n": n, "m": m, "b_in": b_in, "b_out": b_out, "core": sparse24_int.KIND}
        return sparse24_int.KIND, {"n": n, "m": m}
    return packs, {}


def _mixed(targets: Mapping[str, Target], embedding: bool) -> bool:
    """Whether stock transformers would read weights of several widths or groups with those of one, without an error.

    Asymmetric ones, and all where an embedding is among them, it dequantizes at load, by one group of the config (5.24,
    `integrations/compressed_tensors.py: get_dense_scheme`).
    """
    several = len({(t.params["bits"], t.params["group_size"]) for t in targets.values()}) > 1
    return several and (embedding or not all(t.params["symmetric"] for t in targets.values()))


def _unreadable(target: Target, mixed: bool) -> bool:
    """A single word row of packed 4-bit zero-points: compressed-tensors 0.20 fails on it, so we do not write it.

    Where widths are mixed such a linear stays dense at any width, so that what is compressed does not depend on the choice.
    """
    params, shape = target.params, target.shape
    four = mixed or params["bits"] == 4
    return four and not params["symmetric"] and shape[0] <= 8 and int_grouped.groups(params, shape) > 1


def _targets(
    skeleton: Skeleton, view: CheckpointView, config: Any, ignore: tuple[str, ...], choices: Choices, layout: str, packs: str
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
            kind, extra = _kind(layout, packs, view.sparsity.get(name))
            targets[name] = Target(name, shape, f"{name}.weight" in conv1d, dtype, {**params, **extra}, kind)
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

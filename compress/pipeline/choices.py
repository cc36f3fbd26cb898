"""Format params that differ from linear to linear: widths given by pattern, widths under a budget, and what gradients decide."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from compress import registry
from compress.checkpoint import dtypes
from compress.errors import CompressError
from compress.methods._quantizer import Grid
from compress.methods._widths import WIDTHS, WidthErrors, choose
from compress.pipeline.layout import Choices, Layout, Target, matcher
from compress.types import Block, Reducer

logger = logging.getLogger(__name__)
WIDTH_SAMPLES = 16  # calibration windows that widths are measured on, where the method has no `samples` of its own


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths as the user asked: `PATTERN=BITS` in order, the last match wins; a budget for all others."""

    rules: tuple[str, ...] = ()
    target: float | None = None  # bits per weight of all compressed linears, scales and all

    @property
    def asked(self) -> bool:
        """Whether widths may differ."""
        return bool(self.rules) or self.target is not None

    def record(self) -> dict[str, Any]:
        """For the manifest; empty where nothing was asked."""
        return {"widths": {"layer_config": list(self.rules), "target_bpw": self.target}} if self.asked else {}

    def fixed(self, layout: Layout) -> dict[str, dict[str, int]]:
        """Widths that rules give."""
        out: dict[str, dict[str, int]] = {}
        for rule in self.rules:
            pattern, _, text = rule.rpartition("=")
            if not pattern or text not in map(str, WIDTHS):
                raise CompressError(
                    f"--layer-config {rule!r} is not PATTERN=BITS with 2, 3, 4 or 8 bits",
                    hint="such as 're:.*down_proj=8'; --ignore leaves a linear dense", usage=True,
                )  # fmt: skip
            test = matcher((pattern,), "--layer-config")
            found = [name for name in layout.targets if test(name)]
            if not found:
                hint = "names look like " + next(iter(layout.targets))
                raise CompressError(f"--layer-config {rule!r} matches no linear", hint=hint, usage=True)
            out |= {name: {"bits": int(text)} for name in found}
        return out

    def check(self, layout: Layout) -> None:
        """Refuse a budget that no choice meets, or that a format cannot use."""
        if self.target is None:
            return
        if not 0 < self.target <= 64:
            raise CompressError(f"--target-bpw {self.target} is not a number of bits", hint="such as 4.25", usage=True)
        if layout.name == "awq":
            raise CompressError("--target-bpw mixes widths, --format awq has 4 bits", hint="use the default format", usage=True)
        fixed = self.fixed(layout)
        weights = _weights(layout)
        least, most = (sum(pick(_sizes(layout, t, fixed)) for t in layout.targets.values()) for pick in (min, max))
        if least > self.budget(layout):
            raise CompressError(
                f"--target-bpw {self.target}: the least choice takes {least / weights:.3f} with its scales",
                hint=f"use {math.ceil(100 * least / weights) / 100:.2f} or more, or larger groups", usage=True,
            )  # fmt: skip
        if most < self.budget(layout):
            logger.warning("--target-bpw %g is more than 8 bits everywhere take (%.3f)", self.target, most / weights)

    def budget(self, layout: Layout) -> int:
        """Bits for all linears together."""
        assert self.target is not None
        return math.floor(self.target * _weights(layout) + 1e-6)

    def guess(self, layout: Layout) -> dict[str, dict[str, int]]:
        """Widths before anything was measured: the rules', and for the others some that take what the budget allows."""
        sizes = {n: t.shape[0] * t.shape[1] for n, t in layout.targets.items()}
        return self.choose(layout, {n: [4.0**-b * size for b in WIDTHS] for n, size in sizes.items()})

    def choose(self, layout: Layout, errors: Mapping[str, Sequence[float]]) -> dict[str, dict[str, int]]:
        """Widths of every linear: the rules', and for the others those of least total error under the budget."""
        fixed = self.fixed(layout)
        if self.target is None:
            return fixed
        targets = list(layout.targets.values())
        options = [[WIDTHS.index(fixed[t.name]["bits"])] if t.name in fixed else list(range(len(WIDTHS))) for t in targets]
        loudest, largest = max(map(max, errors.values())) or 1.0, max(t.shape[0] * t.shape[1] for t in targets)

        def cost(t: Target, i: int) -> float:
            """The measured error, and 1e-8 of the greatest one by size and width, which decides between equals."""
            return errors[t.name][i] + 1e-8 * loudest * 4.0 ** -WIDTHS[i] * t.shape[0] * t.shape[1] / largest

        picked = choose(
            [[cost(t, i) for i in row] for t, row in zip(targets, options, strict=True)],
            [_sizes(layout, t, fixed) for t in targets],
            self.budget(layout),
        )
        assert picked is not None, "the budget was checked"
        return {t.name: {"bits": WIDTHS[row[i]]} for t, row, i in zip(targets, options, picked, strict=True)}


def _weights(layout: Layout) -> int:
    return sum(t.shape[0] * t.shape[1] for t in layout.targets.values())


def _sizes(layout: Layout, target: Target, fixed: Mapping[str, Mapping[str, int]]) -> list[int]:
    """Stored bits of a linear at every width that is open to it."""
    module = registry.by_kind(layout.packs if target.kind == "dense" else target.kind)
    out = []
    for bits in (fixed[target.name]["bits"],) if target.name in fixed else WIDTHS:
        spec = module.spec({**target.params, "bits": bits}, target.shape, target.dtype)
        out.append(8 * sum(dtypes.itemsize(d) * torch.Size(shape).numel() for d, shape in spec.values()))
    return out


def reducers(method: ModuleType, config: Any, layout: Layout, widths: Widths) -> list[Callable[[Block], Reducer]]:
    """What the reverse walk has to reduce; empty where no gradients are needed."""
    out: list[Callable[[Block], Reducer]] = []
    if hasattr(method, "reducer") and method.reducer(Block(0, {}, {}, ()), config) is not None:
        out.append(functools.partial(method.reducer, config=config))
    if widths.target is not None:
        grid = Grid(
            getattr(config, "bits", 4), config.group_size, config.symmetric, layout.scale_dtype,
            sym_scale=getattr(config, "sym_scale", "full"),
        )  # fmt: skip
        out.append(functools.partial(WidthErrors, grid=grid))
    return out


def decide(
    layout: Layout, prefixes: Sequence[str], method: ModuleType, config: Any, widths: Widths,
    kept: Callable[[int], Mapping[str, torch.Tensor]],
) -> Choices:  # fmt: skip
    """Format params of linears that follow from what earlier walks kept of each block, by full name."""
    out: dict[str, dict[str, Any]] = {}
    if hasattr(method, "settle"):

        def results() -> Iterator[Mapping[str, torch.Tensor]]:
            return (kept(i) for i in range(len(prefixes)))

        for prefix, block in zip(prefixes, method.settle(results, config), strict=False):
            out |= {prefix + name: dict(params) for name, params in block.items()}
    errors: dict[str, list[float]] = {}
    if widths.target is not None:
        for i, prefix in enumerate(prefixes):
            found = {k.removeprefix("widths:"): t.tolist() for k, t in kept(i).items() if k.startswith("widths:")}
            errors |= {prefix + name: row for name, row in found.items()}
        silent = [name for name, row in errors.items() if not max(row)]
        if silent:
            logger.warning("%d linears have no gradient here, so their widths follow their sizes: %s …", len(silent), silent[0])
    for name, params in widths.choose(layout, errors).items():
        out[name] = {**out.get(name, {}), **params}
    if widths.target is not None:
        counts = Counter(p["bits"] for p in out.values() if "bits" in p)
        logger.info("widths chosen: %s", ", ".join(f"{n} linears at {b} bits" for b, n in sorted(counts.items())))
    return out

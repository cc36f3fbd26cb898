"""What GPTQ and RSQ share: options, stages, and one block's solution with the Hessian solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from compress.errors import CompressError, nearest
from compress.methods import _solvers
from compress.methods._inputs import per_input, readers, stages
from compress.methods._pack import pack_codes
from compress.methods._quantizer import Grid, check_grid, check_groups
from compress.stats import InputStats
from compress.types import Block, Collect, Packed, Result, Runner, Stat

__all__ = ["SecondOrder", "alike", "collects", "compress", "seen_by_core", "stages", "workspace"]


@dataclass(frozen=True, slots=True)
class SecondOrder:
    """Options of every method that rounds with a Hessian."""

    bits: int = field(default=4, metadata={"help": "bits per weight: 2, 3, 4 or 8"})
    group_size: int = field(default=128, metadata={"help": "inputs that share a scale; -1: a whole row"})
    symmetric: bool = field(default=True, metadata={"help": "no zero-points"})
    sym_scale: str = field(default="full", metadata={"help": "symmetric scale: full = 2 max/(2^b-1), restricted = max/(2^(b-1)-1)"})
    clip: str = field(default="hessian", metadata={"help": "shrink each group's range: off, mse (norm 2.4), hessian"})
    damp: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the Hessian"})
    act_order: str = field(default="group", metadata={"help": "columns by falling activation: off, static (scales first), group"})
    sequential: bool = field(default=True, metadata={"help": "collect again after every group of linears (qkv, o, gate/up, down)"})
    propagate: ClassVar[bool] = True  # calibrate each block on the compressed blocks before it

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, self.sym_scale)
        for option, value, known in (("act-order", self.act_order, _solvers.ACT_ORDERS), ("clip", self.clip, _solvers.CLIPS)):
            if value not in known:
                raise CompressError(f"--{option} {value!r} is unknown", hint=nearest(value, list(known)), usage=True)
        if not 0 <= self.damp <= 10:
            raise CompressError("--damp must be in 0..10", hint="0.01 is usual", usage=True)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a linear (O, I) that this configuration cannot hold."""
        check_groups(name, shape[1], self.group_size)

    def params(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Format parameters of a linear (O, I)."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}


def collects(block: Block, config: Any) -> Collect:
    """One Hessian per input."""
    return per_input(block, Stat.GRAM)


def workspace(block: Block, config: SecondOrder) -> int:
    """Bytes that `compress` needs for its largest group of linears: copies of the Hessian, and of the rows solved at a time."""
    most = 0
    for names in readers(block):
        rows, inputs = sum(block.weights[n].shape[0] for n in names), block.weights[names[0]].shape[1]
        chunk = min(rows, max(_solvers.LEAST_ROWS, _solvers.CHUNK // inputs))
        most = max(most, 4 * inputs * (4 * inputs + 2 * rows + 6 * chunk))
    return most


def compress(
    block: Block, stats: Mapping[str, InputStats], config: SecondOrder, run: Runner | None, scale_dtype: torch.dtype
) -> Result:
    """Round the linears of the block; those that read the same input are solved as one tall matrix."""
    grid = Grid(
        config.bits, config.group_size, config.symmetric, scale_dtype, sym_scale=config.sym_scale, mse_clip=config.clip == "mse"
    )  # fmt: skip
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    record: list[dict[str, Any]] = []
    for together in readers(block):
        for own, sparse, names in alike(block, together, grid):
            W = torch.cat([block.weights[n].float() for n in names])
            H = stats[names[0]].hessian()
            if names[0] in block.wrappers:
                H = seen_by_core(H, block.wrappers[names[0]][0])
            solved, facts = _solvers.second_order(
                W, H, own, damp=config.damp, act_order=config.act_order, clip=config.clip, name=names[0], sparse=sparse
            )
            record.append({"linears": names, **facts})
            start = 0
            for n in names:
                rows = slice(start, start + block.weights[n].shape[0])
                start = rows.stop
                packed[n], errors[n] = pack_codes(W[rows], solved.q[rows], solved.scale[rows], solved.zero[rows], own)
    return Result(packed, {}, errors, {"hessian": record})


def alike(block: Block, together: list[str], grid: Grid) -> list[tuple[Grid, bool, list[str]]]:
    """The linears that share an input and can be solved as one: by their grid, and by whether their zeros must stay."""
    found: dict[tuple[Grid, bool, str], list[str]] = {}
    for n in together:
        own = n if n in block.wrappers else ""  # a core's inputs are its own
        found.setdefault((grid.at(block.params.get(n)), n in block.sparse, own), []).append(n)
    return [(own, sparse, names) for (own, sparse, _), names in found.items()]


def seen_by_core(H: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """B H Bᵀ (I, I) for B = blockdiag(pre): the second moment of what ARMOR's core sees."""
    I, (blocks, b, _) = len(H), pre.shape
    wide = blocks * b  # more than I where the last block is smaller
    H = H if wide == I else torch.nn.functional.pad(H, (0, wide - I, 0, wide - I))
    left = (pre @ H.view(blocks, b, wide)).view(wide, wide)
    return (pre @ left.T.reshape(blocks, b, wide)).view(wide, wide)[:I, :I]

"""RTN: round to nearest on a per-group integer grid; no data.

    W_hat = Q(W)      elementwise nearest point of each group's grid

The baseline of every paper of the field, and the reference point of AWQ's guarantee. The grid is `_quantizer`; with
`mse_clip` each group's range is shrunk to the least sum |Q(w) - w|^2.4 first (IST-DASLab/gptq `quant.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.methods._pack import quantize
from compress.methods._quantizer import Grid, check_grid, check_groups
from compress.types import Block, Collect, Result, Runner

CALIBRATED = False
CORES = True  # quantizes ARMOR's cores


@dataclass(frozen=True, slots=True)
class Config:
    """Options of RTN."""

    bits: int = field(default=4, metadata={"help": "bits per weight: 2, 3, 4 or 8"})
    group_size: int = field(default=128, metadata={"help": "inputs that share a scale; -1: a whole row"})
    symmetric: bool = field(default=False, metadata={"help": "no zero-points"})
    sym_scale: str = field(default="full", metadata={"help": "symmetric scale: full = 2 max/(2^b-1), restricted = max/(2^(b-1)-1)"})
    mse_clip: bool = field(default=False, metadata={"help": "shrink each group's range to the least error"})
    quality: bool = field(default=False, metadata={"help": "best mode: turns mse_clip on"})

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, self.sym_scale)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a linear (O, I) that this configuration cannot hold."""
        check_groups(name, shape[1], self.group_size)

    def params(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Format parameters of a linear (O, I)."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}


def collects(block: Block, config: Config) -> Collect:
    """Nothing: RTN needs no data."""
    return Collect()


def compress(block: Block, stats: Mapping[str, Any], config: Config, run: Runner | None, scale_dtype: torch.dtype) -> Result:
    """Round every linear of the block."""
    grid = Grid(
        config.bits, config.group_size, config.symmetric, scale_dtype,
        sym_scale=config.sym_scale, mse_clip=config.mse_clip or config.quality,
    )  # fmt: skip
    done = {name: quantize(W, grid.at(block.params.get(name))) for name, W in block.weights.items()}
    return Result({n: packed for n, (packed, _) in done.items()}, errors={n: error for n, (_, error) in done.items()})

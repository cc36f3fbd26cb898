"""ASVD: SVD of the weight with its columns scaled by how large their inputs are (arXiv 2312.05821).

    minimise over rank(L) <= r   |(W - L) diag(s)|²,     s_j = (mean over tokens of |x_j|)^alpha + 1e-6

Source: hahnyuan/ASVD4LLM `modules/svd_linear.py`, `act_aware_utils.py`. There the means are summed over windows, which scales s and
changes nothing but the weight of 1e-6, and the SVD is a randomised one of the wanted rank. Its search for a rank per linear by
perplexity is not built: every linear keeps the share itself. All statistics come from the dense model, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from compress.errors import CompressError
from compress.methods import _factorize, _lowrank
from compress.methods._factorize import workspace
from compress.methods._inputs import per_input
from compress.stats import InputStats
from compress.types import Block, Collect, Result, Runner, Stat

VERB = "factorize"
CALIBRATED = True
__all__ = ["CALIBRATED", "VERB", "Config", "collects", "compress", "workspace"]


@dataclass(frozen=True, slots=True)
class Config(_factorize.Factorize):
    """Options of ASVD."""

    alpha: float = field(default=0.5, metadata={"help": "power of the mean absolute input that scales a column; 0: plain SVD"})
    propagate: bool = field(default=False, metadata={"help": "calibrate each block on the factorized blocks before it"})

    def __post_init__(self) -> None:
        if self.recover:
            object.__setattr__(self, "propagate", True)
        _factorize.Factorize.__post_init__(self)
        if not 0 <= self.alpha <= 4:
            raise CompressError(f"--alpha {self.alpha} is not in 0..4", hint="the paper's is 0.5", usage=True)


def collects(block: Block, config: Config) -> Collect:
    """The mean absolute value of every input."""
    return per_input(block, Stat.ABSMEAN)


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Factorize every linear of the block."""

    def moments(name: str) -> _lowrank.Moment:
        return _lowrank.moment((stats[name].absmean().double() ** config.alpha + 1e-6).square(), 0.0, name)

    return _factorize.plain_rank(block, moments, config, scale_dtype)

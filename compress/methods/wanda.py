"""Wanda: weights times input norms decide what goes; what stays is unchanged (arXiv 2306.11695).

    minimise over masks with a fixed count per output   sum_ij (1 - M_ij) W_ij² s_j,     s_j = mean over tokens of x_j²

Blocks in order, each calibrated on the pruned blocks before it (locuslab/wanda `lib/prune.py: prune_wanda`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from compress.methods import _sparsity
from compress.methods._inputs import per_input, stages
from compress.methods._sparsity import settle, spool, surveys
from compress.stats import InputStats
from compress.types import Block, Collect, Result, Runner, Stat

VERB = "prune"
CALIBRATED = True
__all__ = [
    "CALIBRATED", "VERB", "Config", "collects", "compress", "settle", "spool", "stages", "survey", "survey_collects",
    "surveys",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config(_sparsity.Sparse):
    """Options of Wanda."""

    scope: str = field(default="row", metadata={"help": "where the share is counted: row (the paper's), matrix, model"})
    sequential: bool = field(default=False, metadata={"help": "collect again after every group of linears (qkv, o, gate/up, down)"})
    propagate: bool = field(default=True, metadata={"help": "calibrate each block on the pruned blocks before it"})

    def __post_init__(self) -> None:
        _sparsity.Sparse.__post_init__(self)
        _sparsity.check_scope(self.scope, self.pattern)
        _sparsity.check_walk(self.sequential, self.propagate)


def collects(block: Block, config: Config) -> Collect:
    """One energy per input."""
    return per_input(block, Stat.ENERGY)


survey_collects = collects


def _score(stats: Mapping[str, InputStats]) -> _sparsity.Score:
    return lambda name, W: W.abs() * stats[name].energy().sqrt()


def survey(
    block: Block, stats: Mapping[str, InputStats], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Histograms of the block's scores."""
    return _sparsity.histograms(block, _score(stats))


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Prune every linear of the block."""
    return _sparsity.masked(block, _score(stats), config, scale_dtype)

"""Wanda: weights times input norms decide what goes; what stays is unchanged (arXiv 2306.11695).

    minimise over masks with a fixed count per output   sum_ij (1 - M_ij) W_ij² s_j,     s_j = mean over tokens of x_j²

Blocks in order, each calibrated on the pruned blocks before it (locuslab/wanda `lib/prune.py: prune_wanda`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from compress.methods import _sparsity
from compress.stats import InputStats
from compress.types import Block, Collect, Packed, Result, Runner, Stat

VERB = "prune"
CALIBRATED = True


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


def stages(block: Block, config: Config) -> tuple[tuple[str, ...], ...]:
    """All at once, or the linears that read the same input one group after the other."""
    return _sparsity.stages(block, config.sequential)


def collects(block: Block, config: Config) -> Collect:
    """One energy per input."""
    return _sparsity.collects(block, Stat.ENERGY)


def _score(W: torch.Tensor, stats: InputStats) -> torch.Tensor:
    return W.abs() * stats.energy().sqrt()


def surveys(config: Config) -> bool:
    """One threshold for the model needs all scores' histogram first; they are the dense model's."""
    return config.scope == "model"


survey_collects = collects


def survey(
    block: Block, stats: Mapping[str, InputStats], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Histograms of the block's scores."""
    return {f"histogram:{n}": _sparsity.histogram(_score(W.float(), stats[n])) for n, W in block.weights.items()}, {}


def settle(results: Callable[[], Iterator[Mapping[str, torch.Tensor]]], config: Config) -> list[dict[str, dict[str, int]]]:
    """How many weights each linear keeps."""
    return _sparsity.share_out_results(results, config)


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Prune every linear of the block."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    for name, W in _sparsity.weights(block):
        mask = _sparsity.select(_score(W, stats[name]), config, block.params[name])
        packed[name], errors[name] = _sparsity.pack(W, W * mask, mask, config, scale_dtype, name)
    return Result(packed, errors=errors)

"""Magnitude pruning: the smallest weights go; no data.

    minimise over masks of a fixed count   |W - M * W|²

The baseline of every paper of the field. Counts are exact where locuslab/wanda `prune_magnitude` prunes one weight more, and more
again where weights are equal (bf16 has many equal ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.methods import _sparsity
from compress.types import Block, Collect, Packed, Result, Runner

VERB = "prune"
CALIBRATED = False


@dataclass(frozen=True, slots=True)
class Config(_sparsity.Sparse):
    """Options of magnitude pruning."""

    scope: str = field(default="matrix", metadata={"help": "where the share is counted: row, matrix, model (one threshold)"})

    def __post_init__(self) -> None:
        _sparsity.Sparse.__post_init__(self)
        _sparsity.check_scope(self.scope, self.pattern)

    @property
    def propagate(self) -> bool:
        """Recovery runs behind the pruned blocks."""
        return self.recover > 0


def collects(block: Block, config: Config) -> Collect:
    """Nothing."""
    return Collect()


def observes(config: Config) -> bool:
    """Text runs through the blocks for recovery only."""
    return config.recover > 0


def surveys(config: Config) -> bool:
    """One threshold for the model needs all weights' histogram first."""
    return config.scope == "model"


def survey(
    block: Block, stats: Mapping[str, Any], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Histograms of the block's scores."""
    return {f"histogram:{n}": _sparsity.histogram(W.float().abs()) for n, W in block.weights.items()}, {}


def settle(results: Callable[[], Iterator[Mapping[str, torch.Tensor]]], config: Config) -> list[dict[str, dict[str, int]]]:
    """How many weights each linear keeps."""
    return _sparsity.share_out_results(results, config)


def compress(block: Block, stats: Mapping[str, Any], config: Config, run: Runner | None, scale_dtype: torch.dtype) -> Result:
    """Prune every linear of the block."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    for name, W in _sparsity.weights(block):
        mask = _sparsity.select(W.abs(), config, block.params[name])
        packed[name], errors[name] = _sparsity.pack(W, W * mask, mask, config, scale_dtype, name)
    return Result(packed, errors=errors)

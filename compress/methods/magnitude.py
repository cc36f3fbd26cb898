"""Magnitude pruning: the smallest weights go; no data.

    minimise over masks of a fixed count   |W - M * W|²

The baseline of every paper of the field. Counts are exact where locuslab/wanda `prune_magnitude` prunes one weight more, and more
again where weights are equal (bf16 has many equal ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.methods import _sparsity
from compress.methods._sparsity import settle, spool, surveys
from compress.types import Block, Collect, Result, Runner

VERB = "prune"
CALIBRATED = False
__all__ = ["CALIBRATED", "VERB", "Config", "collects", "compress", "observes", "settle", "spool", "survey", "surveys"]


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


def survey(
    block: Block, stats: Mapping[str, Any], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Histograms of the block's scores."""
    return _sparsity.histograms(block, _score)


def _score(name: str, W: torch.Tensor) -> torch.Tensor:
    return W.abs()


def compress(block: Block, stats: Mapping[str, Any], config: Config, run: Runner | None, scale_dtype: torch.dtype) -> Result:
    """Prune every linear of the block."""
    return _sparsity.masked(block, _score, config, scale_dtype)

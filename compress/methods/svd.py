"""SVD: the nearest product of two thin factors; no data.

    minimise over rank(L) <= r   |W - L|²,     r = floor(keep O I / (O + I))

The baseline of every paper of the field, and unusable on language models (LLaMA-7B at 80 %: perplexity 20061, by SVD-LLM's table).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.methods import _factorize, _lowrank
from compress.methods._factorize import workspace
from compress.types import Block, Collect, Result, Runner

VERB = "factorize"
CALIBRATED = False
__all__ = ["CALIBRATED", "VERB", "Config", "collects", "compress", "observes", "workspace"]


@dataclass(frozen=True, slots=True)
class Config(_factorize.Factorize):
    """Options of plain SVD."""

    @property
    def propagate(self) -> bool:
        """Recovery runs behind the factorized blocks."""
        return self.recover > 0


def collects(block: Block, config: Config) -> Collect:
    """Nothing."""
    return Collect()


def observes(config: Config) -> bool:
    """Text runs through the blocks for recovery only."""
    return config.recover > 0


def compress(block: Block, stats: Mapping[str, Any], config: Config, run: Runner | None, scale_dtype: torch.dtype) -> Result:
    """Factorize every linear of the block."""

    def moments(name: str) -> _lowrank.Moment:
        W = block.weights[name]
        return _lowrank.plain(W.shape[1], W.device)

    return _factorize.plain_rank(block, moments, config, scale_dtype)

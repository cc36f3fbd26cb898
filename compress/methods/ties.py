"""TIES: trim each fine-tune's deltas, elect signs, average those that agree (arXiv 2306.01708).

Source: github prateeky2806/ties-merging and nik-dim/tall_masks `src/utils/ties_utils.py`. Thresholds are exact and over the
whole model, one per fine-tune: the k-th largest magnitude, found in two passes over the bits; a sum of 0 takes the majority's
sign, as theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from compress.methods import _merging

VERB = "merge"
CALIBRATED = False
ALPHAS = tuple(round(0.8 + 0.1 * i, 1) for i in range(18))  # the readme's grid
ALPHA = 1.0


@dataclass(frozen=True, slots=True)
class Config:
    """Options of `compress merge -m ties`."""

    alpha: float | None = field(default=None, metadata={"help": "Factor of the merged delta; default: by --validation, else 1."})
    density: float = field(default=0.2, metadata={"help": "Share of each fine-tune's deltas that is kept."})

    def __post_init__(self) -> None:
        _merging.check(self.alpha, self.density)

    trims = True
    masked = False
    lam = 0.0


def merged(tau: torch.Tensor, lambdas: Sequence[float], config: Config, trim: _merging.Trim | None) -> torch.Tensor:
    """The delta (R, C) before alpha of deltas (T, R, C)."""
    return _merging.total(tau, trim, mean=True)

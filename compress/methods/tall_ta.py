"""Task arithmetic on the weights that some fine-tune needs: `consensus` with k = 1 (arXiv 2405.07813).

    theta = theta_0 + alpha 1[sum over t of m_t >= 1] sum of tau_t,   m_t = 1[|tau_t| > lam |v - tau_t|]

It drops only what the paper calls catastrophic weights, which no task's mask keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from compress.methods import _merging

VERB = "merge"
CALIBRATED = False
ALPHAS = _merging.ALPHAS
ALPHA = _merging.ALPHA


@dataclass(frozen=True, slots=True)
class Config:
    """Options of `compress merge -m tall-ta`."""

    alpha: float | None = field(default=None, metadata={"help": "Factor of the merged delta; default: by --validation, else 0.4."})
    lam: float = field(default=0.2, metadata={"help": "lambda of every task's mask, where --validation does not choose it."})

    def __post_init__(self) -> None:
        _merging.check(self.alpha, lam=self.lam)

    masked = True
    trims = False
    density = 1.0


def merged(tau: torch.Tensor, lambdas: Sequence[float], config: Config, trim: _merging.Trim | None) -> torch.Tensor:
    """The delta (R, C) before alpha of deltas (T, R, C)."""
    return _merging.consensus(tau, _merging.total(tau, None), lambdas, 1)

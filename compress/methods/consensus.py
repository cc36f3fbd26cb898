"""Consensus merging: keep a weight's merged delta where at least k fine-tunes need it (arXiv 2405.07813).

    theta = theta_0 + alpha 1[sum over t of m_t >= k] v,   m_t = 1[|tau_t| > lam |v - tau_t|]

v is the sum of the deltas, or TIES' disjoint sum. Source: github nik-dim/tall_masks, `construct_consensus_mask`. k = 0 keeps
all, 1 drops "catastrophic" weights that no task needs, 2 also "selfish" ones that one task needs. Without validation text lam
and alpha are MergeBench's fixed values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from compress.errors import CompressError, nearest
from compress.methods import _merging

VERB = "merge"
CALIBRATED = False
ALPHAS = _merging.ALPHAS
ALPHA = _merging.ALPHA


@dataclass(frozen=True, slots=True)
class Config:
    """Options of `compress merge -m consensus`."""

    alpha: float | None = field(default=None, metadata={"help": "Factor of the merged delta; default: by --validation, else 0.4."})
    k: int = field(default=2, metadata={"help": "Fine-tunes that must need a weight: 0 keeps all, 1 the union of the masks."})
    lam: float = field(default=0.2, metadata={"help": "lambda of every task's mask, where --validation does not choose it."})
    vector: str = field(default="sum", metadata={"help": "The multi-task vector: sum or ties."})
    density: float = field(default=0.2, metadata={"help": "Vector ties: share of each fine-tune's deltas that is kept."})

    def __post_init__(self) -> None:
        _merging.check(self.alpha, self.density, self.lam)
        if self.vector not in ("sum", "ties"):
            raise CompressError(f"--vector {self.vector!r} is unknown", hint=nearest(self.vector, ("sum", "ties")), usage=True)
        if self.k < 0:
            raise CompressError(f"--k {self.k} is negative", hint="0 keeps all weights", usage=True)

    masked = True

    @property
    def trims(self) -> bool:
        """Whether thresholds over the whole model are needed."""
        return self.vector == "ties"


def merged(tau: torch.Tensor, lambdas: Sequence[float], config: Config, trim: _merging.Trim | None) -> torch.Tensor:
    """The delta (R, C) before alpha of deltas (T, R, C)."""
    return _merging.consensus(tau, _merging.total(tau, trim), lambdas, config.k)

"""EMR-Merging: elected signs, the largest agreeing magnitudes, a mask and one factor per task (arXiv 2405.17461).

    sigma = sign(sum of tau_t),  v = sigma max over {t: tau_t sigma > 0} of |tau_t|,  m_t = 1[tau_t sigma > 0]
    g_t = sum over tensors of mean|tau_t| / sum over tensors of mean|m_t v|

Source: github harveyhuang18/EMR_Merging. A baseline of the bundle: the same bytes as tallmask, one factor per task repeated for
every tensor. Difference: v is stored as --shared says, and g is taken of what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from compress.methods import _taskmask
from compress.methods._taskmask import Sums

VERB = "bundle"
CALIBRATED = False


@dataclass(frozen=True, slots=True)
class Config:
    """Options of `compress bundle -m emr`."""

    shared: str = field(default="int8", metadata={"help": "How the shared vector is stored: bf16, int8 or int4."})
    embeddings: bool = field(default=True, metadata={"help": "Treat embedding and head as any other tensor."})

    def __post_init__(self) -> None:
        _taskmask.check_shared(self.shared)

    are_signs = False
    trims = False
    pair = False
    tuned = False


def shared(tau: torch.Tensor, sums: Sums, config: Config, trim: object = None) -> torch.Tensor:
    """v (R, C) of a piece of the deltas (T, R, C)."""
    return _taskmask.unified(tau)


def provisional(sums: Sums, config: Config) -> list[float]:
    """Nothing is scaled while v is sought."""
    return [1.0] * len(sums.tau1)


def bits(tau: torch.Tensor, v: torch.Tensor, factor: float, lam: float, config: Config) -> torch.Tensor:
    """Where a task's delta has the elected sign."""
    return tau * v > 0


def scales(tensors: Sequence[Sums], config: Config) -> list[list[float]]:
    """g_t, the same for every tensor."""
    tasks = range(len(tensors[0].tau1)) if tensors else range(0)
    wanted = [sum(s.tau1[t] / s.count for s in tensors) for t in tasks]
    found = [sum(s.d1[t] / s.count for s in tensors) for t in tasks]
    g = [_taskmask.half(a / b) if b > 0 else 1.0 for a, b in zip(wanted, found, strict=True)]
    return [g for _ in tensors]

"""BitDelta: the sign of every delta and its mean magnitude per tensor (arXiv 2402.10193); nothing is shared between tasks.

    min over s and signs of |tau - s sgn|²:  sgn = sign(tau), zero counts as +1,  s = mean|tau|

Source: github FasterDecoding/BitDelta, `bitdelta/diff.py`. A baseline of the bundle. As published it takes the linears of the
blocks and leaves embeddings, head and norms whole (--embeddings takes them too). Its second step, distilling the scales, is not
here.
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
    """Options of `compress bundle -m bitdelta`."""

    embeddings: bool = field(default=False, metadata={"help": "Treat embedding and head as any other tensor."})

    shared = _taskmask.CONSTANT
    are_signs = True
    trims = False
    pair = False
    tuned = False


def shared(tau: torch.Tensor, sums: Sums, config: Config, trim: object = None) -> torch.Tensor:
    """The tasks' average mean magnitude (1,): factors near 1 fit fp16 however small the deltas are."""
    means = [m for m in sums.mean_abs() if m > 0]
    return torch.tensor([sum(means) / len(means)], dtype=torch.float32, device=tau.device)


def provisional(sums: Sums, config: Config) -> list[float]:
    """Signs need no factor."""
    return [1.0] * len(sums.tau1)


def bits(tau: torch.Tensor, v: torch.Tensor, factor: float, lam: float, config: Config) -> torch.Tensor:
    """The signs (R, C) of one task's deltas."""
    return _taskmask.signs(tau)


def scales(tensors: Sequence[Sums], config: Config) -> list[list[float]]:
    """mean|tau_t| in units of the shared number: what least squares gives."""
    return [_taskmask.least_squares(s) for s in tensors]

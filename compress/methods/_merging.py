"""What the merge methods share: the multi-task vector, and counts of tasks whose TALL mask keeps a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.errors import CompressError
from compress.methods import _taskmask

ALPHA = 0.4  # MergeBench's scaling, used where no validation text chooses one
LAM = 0.2  # and its lambda, for every task
ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 11))
Trim = tuple[Sequence[float], float]  # each task's threshold, the majority's sign


def check(alpha: float | None, density: float | None = None, lam: float = LAM) -> None:
    """Refuse options outside their range."""
    if alpha is not None and not 0 <= alpha <= 5:
        raise CompressError(f"--alpha {alpha} is out of range", hint="0.1 to 1; ties up to 2.5", usage=True)
    if density is not None and not 0 < density <= 1:
        raise CompressError(f"--density {density} is not a share", hint="such as 0.2", usage=True)
    if lam < 0:
        raise CompressError(f"--lam {lam} is negative", hint="0.2 to 1", usage=True)


def total(tau: torch.Tensor, trim: Trim | None, mean: bool = False) -> torch.Tensor:
    """The multi-task vector (R, C) of deltas (T, R, C): their sum, or with thresholds TIES' disjoint sum (or mean)."""
    if trim is None:
        return tau.sum(0)
    kept = _taskmask.trimmed(tau, trim[0])
    return _taskmask.disjoint(kept, _taskmask.elected(kept, trim[1]), mean)


def counts(tau: torch.Tensor, v: torch.Tensor, lambdas: Sequence[float]) -> torch.Tensor:
    """How many tasks' masks keep each weight, uint8 (R, C)."""
    found = torch.zeros(v.shape, dtype=torch.uint8, device=v.device)
    for t, lam in zip(tau, lambdas, strict=True):
        found += _taskmask.tall(t, v, lam)
    return found


def consensus(tau: torch.Tensor, v: torch.Tensor, lambdas: Sequence[float], k: int) -> torch.Tensor:
    """v where at least k masks keep it (tall_masks `construct_consensus_mask`); k = 0 keeps all."""
    return v if k <= 0 else v * (counts(tau, v, lambdas) >= k)

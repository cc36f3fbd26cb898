"""What a linear loses at each width, measured where it counts, and the cheapest choice of widths under a budget.

    e(l, b) = sum over tokens t and outputs o of (dL/dy_to)² ((Q_b(W) - W) x_t)_o²

the squared output error of plain rounding at b bits (it stands in for whatever the method does beyond it), weighted by the squared
gradient of the loss at that output: the diagonal of the empirical Fisher matrix of the outputs, so that errors of different
linears can be compared. The choice is a multiple-choice knapsack, minimise sum e(l, b_l) subject to sum size(l, b_l) <= budget,
solved exactly as an integer program (HiGHS, by scipy).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.methods._quantizer import Grid, fake
from compress.types import Block

WIDTHS = (2, 3, 4, 8)


class WidthErrors:
    """`types.Reducer`: e(l, b) of a block's linears for every width, fp64 (4,)."""

    def __init__(self, block: Block, grid: Grid) -> None:
        self._errors: dict[str, torch.Tensor] = {}
        self._D: dict[str, list[torch.Tensor]] = {}  # Q_b(W) - W (O, I), bf16: an error needs no more digits
        for name, W in block.weights.items():
            W = W.float().contiguous()
            self._D[name] = [fake(W, grid.at({"bits": b})).sub_(W).to(torch.bfloat16) for b in WIDTHS]
            self._errors[name] = torch.zeros(len(WIDTHS), dtype=torch.float64)

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        weight = dy.float().square()
        x = x.float()
        for i, D in enumerate(self._D[name]):
            self._errors[name][i] += (x @ D.float().T).square_().mul_(weight).sum(dtype=torch.float64).cpu()

    def result(self) -> dict[str, torch.Tensor]:
        return {f"widths:{name}": error for name, error in self._errors.items()}


def choose(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """The option of every item with the least total error whose sizes fit into the budget; None where nothing fits."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    if sum(map(min, sizes)) > budget:
        return None
    counts = [len(row) for row in errors]
    cost = np.concatenate([np.asarray(row, dtype=np.float64) for row in errors])
    weight = np.concatenate([np.asarray(row, dtype=np.float64) for row in sizes])
    item = np.repeat(np.arange(len(errors)), counts)
    one_each = coo_array((np.ones(len(cost)), (item, np.arange(len(cost)))), shape=(len(errors), len(cost)))
    spread = float(np.ptp(cost)) or 1.0
    unit = max(1, int(np.gcd.reduce([int(s) for row in sizes for s in row])))
    found = milp(
        cost * (1e6 / spread), integrality=np.ones(len(cost)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None, :] / unit, -np.inf, budget // unit + 0.25)],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    assert found.success, found.message
    starts = np.cumsum([0, *counts[:-1]])
    picked = [int(np.argmax(found.x[s : s + c])) for s, c in zip(starts, counts, strict=True)]
    assert sum(row[i] for row, i in zip(sizes, picked, strict=True)) <= budget
    return picked

"""One budget of parameters for all linears: which rank and how many columns each gets, by what they gain.

    minimise sum over linears of e(l, r_l, s_l)     subject to     sum of r (O + I - s) + s O <= keep * sum of O I

e is exact for every rank at once (`_lowrank.Problem.tail`), on a grid of columns. The steps of each linear's lower convex hull
are taken by gain per parameter until the budget is full (the optimum of the linear relaxation, up to the last step), and what is
left is spent by single exchanges. All columns (s = I) is the whole weight: a linear that no factorization serves stays as it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Options:
    """What one linear may become, by rising cost and falling error: no option costs more and errs more than another."""

    cost: list[int]
    error: list[float]
    rank: list[int]
    columns: list[int]


def cost_of(rank: int, columns: int, shape: tuple[int, int], compact: bool = True) -> int:
    """Parameters of a factorization of a weight of `shape` (O, I)."""
    return rank * (shape[0] + shape[1] - columns * compact) + columns * shape[0]


def rank_of(budget: int, columns: int, shape: tuple[int, int], multiple: int = 1, compact: bool = True) -> int:
    """The largest rank within a budget of parameters beside so many columns; negative where they do not fit."""
    left = budget - columns * shape[0]
    if left < 0:
        return -1
    found = min(left // (shape[0] + shape[1] - columns * compact), *shape) if columns < shape[1] else 0
    return found if found == min(shape) else found // multiple * multiple


def options(
    tails: torch.Tensor, columns: Sequence[int], shape: tuple[int, int], weight: float, multiple: int, compact: bool = True
) -> Options:  # fmt: skip
    """The options of a linear from its least errors (len(columns), k + 1) at every number of columns and every rank."""
    O, I = shape
    points: list[tuple[int, float, int, int]] = [(O * I, 0.0, 0, I)]
    for row, s in zip(tails.tolist(), columns, strict=True):
        for rank in range(0, len(row), multiple):
            cost = cost_of(rank, s, shape, compact)
            if (rank or s) and cost < O * I:
                points.append((cost, weight * row[rank], rank, s))
    kept: list[tuple[int, float, int, int]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return Options(*map(list, zip(*kept, strict=True)))


def _hull(o: Options) -> list[int]:
    """Indices of the lower convex hull of error over cost."""
    out: list[int] = []
    for i in range(len(o.cost)):
        while len(out) > 1:
            a, b = out[-2], out[-1]
            if (o.error[a] - o.error[b]) * (o.cost[i] - o.cost[a]) <= (o.error[a] - o.error[i]) * (o.cost[b] - o.cost[a]):
                out.pop()
            else:
                break
        out.append(i)
    return out


def allocate(linears: Sequence[Options], budget: int) -> list[int] | None:
    """The option of every linear; None where even the smallest do not fit."""
    hulls = [_hull(o) for o in linears]
    at = [0] * len(linears)  # places on the hulls
    spent = sum(o.cost[h[0]] for o, h in zip(linears, hulls, strict=True))
    if spent > budget:
        return None
    heap: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        o, h, k = linears[i], hulls[i], at[i]
        if k + 1 < len(h):
            gain = (o.error[h[k]] - o.error[h[k + 1]]) / (o.cost[h[k + 1]] - o.cost[h[k]])
            heapq.heappush(heap, (-gain, i))

    for i in range(len(linears)):
        offer(i)
    while heap:
        _, i = heapq.heappop(heap)
        o, h, k = linears[i], hulls[i], at[i]
        step = o.cost[h[k + 1]] - o.cost[h[k]]
        if spent + step <= budget:  # a linear whose next step does not fit waits for the exchanges
            spent, at[i] = spent + step, k + 1
            offer(i)
    return _exchange(linears, [h[k] for h, k in zip(hulls, at, strict=True)], budget - spent)


def _exchange(linears: Sequence[Options], chosen: list[int], left: int) -> list[int]:
    """Spend what is left: again and again the one step, to any option that fits, that gains the most."""
    while True:
        best, which, to = 0.0, -1, -1
        for i, (o, c) in enumerate(zip(linears, chosen, strict=True)):
            for k in range(c + 1, len(o.cost)):
                if o.cost[k] - o.cost[c] > left:
                    break
                if o.error[c] - o.error[k] > best:
                    best, which, to = o.error[c] - o.error[k], i, k
        if which < 0:
            return chosen
        left -= linears[which].cost[to] - linears[which].cost[chosen[which]]
        chosen[which] = to

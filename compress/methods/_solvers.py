"""Second-order rounding: GPTQ's column solver on one Hessian.

    minimise over W_hat on the grid   tr((W - W_hat) H (W - W_hat)ᵀ),     H = sum over tokens of w_t x_t x_tᵀ  (any positive factor)

Source: GPTQ (arXiv 2210.17323, algorithm 1; IST-DASLab/gptq `gptq.py: fasterquant`); add-damp-until-success as ylsung/rsq
`gptq_utils.py`. Columns are rounded one by one; the error of each is pushed onto the columns after it along a row of U, the upper
Cholesky factor of H⁻¹. Where we differ: a group's scale is fitted on the weights *as updated so far* also inside a block of columns
(SpQR does so too; the official code fits it on weights that wait for the block's updates), and U comes from one Cholesky
factorization of the reversed H and a triangular inverse instead of two factorizations and a full inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.errors import CompressError
from compress.methods._quantizer import Grid, decode, encode, fit, fit_weighted

_BLOCK = 128  # columns whose updates wait for each other; no effect on the result
_TRIES = 50
ACT_ORDERS = ("off", "static", "group")
CLIPS = ("off", "mse", "hessian")
CHUNK, LEAST_ROWS = 1 << 23, 256  # weights, but at least so many rows, solved at a time; rows do not depend on each other
Fitter = Callable[[torch.Tensor, torch.Tensor, Grid], tuple[torch.Tensor, torch.Tensor]]  # (W (O, I), weight (I,), grid)


@dataclass(frozen=True, slots=True)
class Factor:
    """U with H⁻¹ = UᵀU for the damped, permuted H, and how it came about."""

    U: torch.Tensor  # (I, I) upper triangular
    order: torch.Tensor | None  # (I,) column of W at each place; None: as it is
    damp: float  # share of the mean diagonal that was added
    dead: torch.Tensor  # (I,) bool: inputs that were always 0

    def cost(self) -> torch.Tensor:
        """What a squared error in each column of W costs after compensation, 1/U_cc², (I,)."""
        cost = self.U.diagonal().square().reciprocal()
        return cost if self.order is None else torch.empty_like(cost).index_copy_(0, self.order, cost)


@dataclass(frozen=True, slots=True)
class Solved:
    """Codes (O, I) uint8 with scale and zero (O, G), fp32."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    value: torch.Tensor | None = None  # (O, I) fp32: weights that are kept as they are, 0 elsewhere and where q is the zero-point

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return (self.q, self.scale, self.zero, *(() if self.value is None else (self.value,)))


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights that are not rounded to the grid but stored as they are, in a 16-bit dtype."""

    mask: torch.Tensor  # (O, I) bool
    dtype: torch.dtype


def invert_upper(R: torch.Tensor) -> torch.Tensor:
    """Inverse of an upper triangular matrix (I, I), in place, at the speed of a matrix product."""
    n = R.shape[0]
    if n <= 64:
        return R.copy_(torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True))
    m = n // 2
    A, B, D = invert_upper(R[:m, :m]), R[:m, m:], invert_upper(R[m:, m:])
    B.copy_(A @ B @ D).neg_()
    return R


def order_of(diagonal: torch.Tensor, act_order: str, group: int) -> torch.Tensor | None:
    """Columns by falling diagonal: all of them ("static"), or groups by their sum and columns inside a group ("group")."""
    if act_order == "off":
        return None
    if act_order == "static":
        return torch.argsort(diagonal, descending=True, stable=True)
    d = diagonal.view(-1, group)
    inside = torch.argsort(d, dim=1, descending=True, stable=True)
    groups = torch.argsort(d.sum(1), descending=True, stable=True)
    return (inside + torch.arange(0, len(diagonal), group, device=d.device).unsqueeze(1))[groups].reshape(-1)


def factorize(H: torch.Tensor, damp: float, act_order: str = "off", group: int = -1, name: str = "") -> Factor:
    """U of H (I, I), which is overwritten. Damping is raised by `damp` until the factorization succeeds, at most 50 times."""
    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    order = order_of(diagonal, act_order, H.shape[0] if group == -1 else group)
    if order is not None:
        H = H[order][:, order]
    H = H.flip(0, 1)
    step = max(damp, 1e-6) * float(H.diagonal().mean(dtype=torch.float64))
    total = 0.0
    if damp > 0:
        H.diagonal().add_(step)
        total = damp
    for _ in range(_TRIES):
        L, failed = torch.linalg.cholesky_ex(H)
        if not failed and torch.isfinite(L.diagonal()).all():
            return Factor(invert_upper(L.flip(0, 1)), order, total, dead)
        H.diagonal().add_(step)
        total += max(damp, 1e-6)
    raise CompressError(
        f"{name}: its Hessian stays indefinite with {total:.3g} of its mean diagonal added",
        hint="use more calibration tokens (--nsamples), or a larger --damp",
    )


def solve(
    W: torch.Tensor, factor: Factor, grid: Grid, fitter: Fitter | None = None,
    fixed: tuple[torch.Tensor, torch.Tensor] | None = None, kept: Kept | None = None, gone: torch.Tensor | None = None,
) -> Solved:  # fmt: skip
    """Round W (O, I) fp32 to the grid, column by column, each group's (scale, zero) by `fitter`, or all of them `fixed` (O, G).

    `fitter` chooses (scale, zero) of a group from its current weights and from what an error costs after compensation, 1/U_cc².
    Weights in `kept` are only rounded to its dtype, as compensated so far. Weights in `gone` (O, I) bool become exactly 0, the
    zero-point's code, whatever the columns before them push onto them.
    """
    O, I = W.shape
    g = grid.size(I)
    W = W.masked_fill(factor.dead, 0.0)
    order = factor.order
    V = (W if order is None else W[:, order]).T.contiguous()  # (I, O): a column of W is contiguous
    keep = None if kept is None else (kept.mask if order is None else kept.mask[:, order]).T.contiguous()
    away = None if gone is None else (gone if order is None else gone[:, order]).T.contiguous()
    where = torch.arange(I, device=W.device) if order is None else order
    scale, zero = (torch.empty(I // g, O, device=W.device) for _ in range(2))
    if fixed is not None:
        scale, zero = fixed[0].T.contiguous(), fixed[1].T.contiguous()
    group_of = (where // g).tolist()
    step = _BLOCK if g >= I or fixed is not None else g * max(1, _BLOCK // g)
    U = factor.U
    diagonal, cost = U.diagonal().tolist(), U.diagonal().square().reciprocal()
    q = torch.empty(I, O, dtype=W.dtype, device=W.device)
    row = replace(grid, group_size=-1)
    for start in range(0, I, step):
        end = min(start + step, I)
        E = torch.empty(end - start, O, dtype=W.dtype, device=W.device)
        for c in range(start, end):
            k = group_of[c]
            if fixed is None and c % g == 0:
                assert fitter is not None
                v = V[c : c + g] if away is None else V[c : c + g].masked_fill(away[c : c + g], 0.0)
                s, z = fitter(v.T.contiguous(), cost[c : c + g], row)
                scale[k], zero[k] = s[:, 0], z[:, 0]
            w, s, z = V[c], scale[k], zero[k]
            code, e = q[c], E[c - start]
            torch.div(w, s, out=code).round_().add_(z).clamp_(0, grid.levels)
            if keep is not None:
                code.copy_(torch.where(keep[c], z, code))
            if away is not None:
                code.copy_(torch.where(away[c], z, code))
            torch.sub(code, z, out=e).mul_(s).neg_().add_(w)
            if keep is not None and kept is not None:
                e.copy_(torch.where(keep[c], w - w.to(kept.dtype).to(w), e))
            V[c + 1 : end].addr_(U[c, c + 1 : end], e, alpha=-1 / diagonal[c])
        E.div_(U.diagonal()[start:end].unsqueeze(1))
        V[end:].addmm_(U[start:end, end:].T, E, alpha=-1)
    value = None if keep is None or kept is None else V.to(kept.dtype).to(V).mul_(keep)
    q = q.to(torch.uint8)
    if order is not None:
        q = torch.empty_like(q).index_copy_(0, order, q)
        value = None if value is None else torch.empty_like(value).index_copy_(0, order, value)
    return Solved(
        q.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), None if value is None else value.T.contiguous()
    )  # fmt: skip


def dequantize(solved: Solved) -> torch.Tensor:
    """W_hat (O, I), fp32."""
    O, G = solved.scale.shape
    W = decode(solved.q.view(O, G, -1).float(), solved.scale, solved.zero).view(O, -1)
    return W if solved.value is None else W.add_(solved.value)


def row_losses(W: torch.Tensor, solved: Solved, H: torch.Tensor) -> torch.Tensor:
    """d H dᵀ for every row d of W_hat - W, (O,)."""
    D = dequantize(solved).sub_(W)
    return (D @ H).mul_(D).sum(1)


def better_rows(W: torch.Tensor, H: torch.Tensor, a: Solved, b: Solved) -> tuple[Solved, float, float]:
    """Row by row the solution of less loss; the sum of its losses, and of those of `b`."""
    ours, theirs = row_losses(W, a, H), row_losses(W, b, H)
    better = (ours <= theirs).unsqueeze(1)
    parts = (torch.where(better, x, y) for x, y in zip(a.parts, b.parts, strict=True))
    least = torch.minimum(ours, theirs).sum(dtype=torch.float64)
    return Solved(*parts), float(least), float(theirs.sum(dtype=torch.float64))


def second_order(
    W: torch.Tensor, H: torch.Tensor, grid: Grid, *, damp: float, act_order: str, clip: str, name: str, sparse: bool = False
) -> tuple[Solved, dict[str, Any]]:
    """Round W (O, I) with H (I, I), row by row never worse than rounding to nearest; and what happened, for the manifest.

    `sparse` keeps the zeros of W exactly.

    `clip`: "off", "mse" (the quantizer's norm-2.4 search) or "hessian" (weighted by what an error costs after compensation).
    """
    fitter: Fitter = fit_weighted if clip == "hessian" else lambda v, _, grid: fit(v, grid)
    factor = factorize(H.clone(), damp, act_order, grid.group_size, name)
    cost = factor.cost()
    parts, losses, plain = [], 0.0, 0.0
    for w in W.split(max(LEAST_ROWS, CHUNK // W.shape[1])):
        fixed = fitter(w.masked_fill(factor.dead, 0.0), cost, grid) if act_order == "static" else None
        solved = solve(w, factor, grid, fitter, fixed, gone=w == 0 if sparse else None)
        nearest = fit(w, grid)
        best, loss, rtn = better_rows(w, H, solved, Solved(encode(w, *nearest, grid), *nearest))
        parts.append(best)
        losses, plain = losses + loss, plain + rtn
    return join(parts), facts(factor, losses / len(W), plain / len(W))


def join(parts: list[Solved]) -> Solved:
    """Solutions of rows that follow each other."""
    return Solved(*(torch.cat(column) for column in zip(*(p.parts for p in parts), strict=True)))


def facts(factor: Factor, loss: float, rtn_loss: float) -> dict[str, Any]:
    """A solution's line in the manifest; losses are means over the rows."""
    return {
        "damp": float(f"{factor.damp:.6g}"), "dead": int(factor.dead.sum()),
        "loss": float(f"{loss:.6g}"), "rtn_loss": float(f"{rtn_loss:.6g}"),
    }  # fmt: skip

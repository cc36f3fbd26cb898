"""SparseGPT's column solver: prune columns one by one, push each error onto the columns after it.

    minimise over masks and values   tr((W - W_hat) H (W - W_hat)ᵀ)

Source: SparseGPT (arXiv 2301.00774, algorithm 1; IST-DASLab/sparsegpt `sparsegpt.py: fasterprune`), with the factor of `_solvers`.
A weight's saliency is w²/U_cc², the loss of removing it once the columns before it are settled. Unstructured: the lowest
saliencies of each block of 128 columns; N:M: the lowest of each group when the walk reaches it, on weights as updated so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from compress.methods._inputs import readers
from compress.methods._masks import keep_highest, keep_n_of_m, zeros
from compress.methods._solvers import Factor, factorize
from compress.stats import InputStats
from compress.types import Block

BLOCK = 128  # columns whose mask is chosen together (the paper's B_s), and whose updates wait for each other


@dataclass(frozen=True, slots=True)
class Pruned:
    """W_hat (O, I) fp32, its mask, the loss ½ tr(D H Dᵀ) with the damped H, and the saliency of every weight."""

    W: torch.Tensor
    mask: torch.Tensor
    loss: float
    saliency: torch.Tensor | None = None  # (O, I) fp32


def sparsify(
    W: torch.Tensor, factor: Factor, *, share: float = 0.5, nm: tuple[int, int] | None = None, scope: str = "matrix",
    mask: torch.Tensor | None = None, keep_saliency: bool = False, outputs: torch.Tensor | None = None, gone: int | None = None,
) -> Pruned:  # fmt: skip
    """Prune W (O, I) fp32 to `share` zeros (or so many as `gone`), to an N:M pattern, or to a given `mask`; `factor` unordered.

    `outputs` (O,) weighs the errors of each row, which counts where rows compete.
    """
    O, I = W.shape
    assert factor.order is None, "columns are pruned in order"
    V = W.masked_fill(factor.dead, 0.0).T.contiguous()
    kept = torch.ones(I, O, dtype=torch.bool, device=W.device) if mask is None else mask.T.contiguous()
    saliency = torch.empty_like(V) if keep_saliency else None
    U = factor.U
    diagonal = U.diagonal()
    step = BLOCK if nm is None else nm[1] * max(1, BLOCK // nm[1])
    loss = 0.0
    for start in range(0, I, step):
        end = min(start + step, I)
        block = V[start:end]
        if saliency is not None:
            saliency[start:end] = block.square() / diagonal[start:end].square().unsqueeze(1)
        if mask is None and nm is None:
            due = _due(share, scope, W.shape, gone)
            kept[start:end] = _chosen(block, diagonal[start:end], due(end) - due(start), scope, outputs)
        E = torch.empty_like(block)
        for c in range(start, end):
            if mask is None and nm is not None and c % nm[1] == 0:
                group = slice(c, c + nm[1])
                e = V[group].square() / diagonal[group].square().unsqueeze(1)
                kept[group] = keep_n_of_m(e.T.contiguous(), *nm).T
            e = E[c - start]
            torch.mul(V[c], ~kept[c], out=e).div_(diagonal[c])
            V[c].mul_(kept[c])
            V[c + 1 : end].addr_(U[c, c + 1 : end], e, alpha=-1)
        loss += 0.5 * float(E.square().sum(dtype=torch.float64))
        V[end:].addmm_(U[start:end, end:].T, E, alpha=-1)
    return Pruned(V.T.contiguous(), kept.T.contiguous(), loss, None if saliency is None else saliency.T.contiguous())


def refit(W: torch.Tensor, pruned: Pruned, H: torch.Tensor, steps: int) -> Pruned:
    """Better values for the same mask: `steps` of conjugate gradients on the loss, for all rows of W (O, I) fp32 at once.

    H (I, I) fp32, damped as for `pruned`. In `sparsify` an error only reaches the columns after it; here all kept values of a row
    answer to each other. Each row is a quadratic of its own, preconditioned by H's diagonal; one that rounding left no better
    keeps its values, so no row's loss rises. ALPS (arXiv 2406.07831) ends with such steps.
    """
    mask, diagonal = pruned.mask, H.diagonal()

    def losses(V: torch.Tensor) -> torch.Tensor:
        gap = V - W
        return (gap @ H).mul_(gap).sum(1, dtype=torch.float64)

    def ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a / b).nan_to_num_(0.0, 0.0, 0.0).to(W.dtype).unsqueeze(1)  # 0/0: a row that is solved

    V = pruned.W.clone()
    R = ((W - V) @ H).mul_(mask)
    P = R / diagonal
    rest = (R * P).sum(1, dtype=torch.float64)
    for _ in range(steps):
        Q = (P @ H).mul_(mask)
        length = ratio(rest, (P * Q).sum(1, dtype=torch.float64))
        V.addcmul_(P, length)
        R.addcmul_(Q, length, value=-1)
        Z = torch.div(R, diagonal, out=Q)
        left = (R * Z).sum(1, dtype=torch.float64)
        P.mul_(ratio(left, rest)).add_(Z)
        rest = left
    before, after = losses(pruned.W), losses(V)
    V = torch.where((after < before).unsqueeze(1), V, pruned.W)
    return Pruned(V, mask, 0.5 * float(torch.minimum(before, after).sum()), pruned.saliency)


def damped(H: torch.Tensor, factor: Factor) -> torch.Tensor:
    """H (I, I), changed in place, as `factor` has factorized it."""
    H.diagonal()[factor.dead] = 1.0
    H.diagonal().add_(factor.damp * float(H.diagonal().mean(dtype=torch.float64)))
    return H


def factors(block: Block, stats: Mapping[str, InputStats], damp: float) -> Iterator[tuple[list[str], Factor]]:
    """Linears that share an input, and the factor of its Hessian."""
    for names in readers(block):
        yield names, factorize(stats[names[0]].hessian(), damp, "off", -1, names[0])


def _due(share: float, scope: str, shape: torch.Size, gone: int | None) -> Callable[[int], int]:
    """Columns -> how many weights (of a row in scope row) are gone once so many were visited; the matrix's count is exact."""
    rows = 1 if scope == "row" else shape[0]
    return lambda end: zeros(share, rows * end) if gone is None else gone * end // shape[1]


def _chosen(block: torch.Tensor, diagonal: torch.Tensor, gone: int, scope: str, outputs: torch.Tensor | None) -> torch.Tensor:
    """Mask (C, O) of a block of columns (C, O), of which `gone` go, in scope row of each row."""
    e = (block.square() / diagonal.square().unsqueeze(1)).T.contiguous()
    if scope == "row":
        return keep_highest(e, gone).T
    if outputs is not None:
        e.mul_(outputs.unsqueeze(1))
    return keep_highest(e.view(1, -1), gone).view(e.shape).T

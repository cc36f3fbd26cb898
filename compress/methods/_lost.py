"""LOST's start (arXiv 2508.02668): low-rank factors and dense input columns from the SVD of one random full-rank weight.

    W = sum s_i u_i v_iᵀ,   B = U_r sqrt(S_r),  A = sqrt(S_r) V_rᵀ,   W_comp = the q triplets after the first r,
    c_j = |W_comp[:, j]|,   I = the s columns of the largest c_j, ascending,   W_s = W[:, I]

Source: the author's sibling repositories (github JiaxiLi1/Lora-init `hybrid_lowrank_sparse_adapter.py`, JiaxiLi1/elsa_finetuning),
the paper's public reviews. W_s takes the columns of W itself, not of what the factors leave, as theirs. Where we differ: W is a
genuine full-rank weight (`run_c4.py` decomposes a product of rank r, whose residual is noise); q is the whole rest unless `band`
says otherwise (256 there); selection is always by c_j (there "random" unless asked).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Factors:
    """A (r, I), B (O, r), W_s (O, s), in the weight's dtype, and the columns (s,) int64, ascending."""

    A: torch.Tensor
    B: torch.Tensor
    columns: torch.Tensor
    W_s: torch.Tensor


def kept(inputs: int, delta: float) -> int:
    """Columns kept of so many inputs: the share delta rounded down, at least one; none where delta is 0."""
    return max(1, int(delta * inputs + 1e-9)) if delta else 0


def complement(
    U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, rank: int, band: int | None = None, last: bool = False
) -> torch.Tensor:
    """W_comp (O, I): the `band` triplets after the first `rank`, all of them for None; the last ones with `last` (an ablation)."""
    q = min(len(S) - rank, len(S) if band is None else band)
    start = len(S) - q if last else rank
    part = slice(start, start + q)
    return (U[:, part] * S[part]) @ Vh[part]


def scores(W_comp: torch.Tensor, norm: int = 2) -> torch.Tensor:
    """c (I,): the L2 (or L1) norm of each column of W_comp (O, I)."""
    return torch.linalg.vector_norm(W_comp, norm, dim=0)


def choose(c: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` columns of the largest scores c (I,), ascending; of equals the first."""
    return c.sort(descending=True, stable=True).indices[:count].sort().values


def initialise(W: torch.Tensor, rank: int, count: int, band: int | None = None, norm: int = 2) -> Factors:
    """The factors of `rank` and the `count` columns of a full-rank random W (O, I); computed in fp32 at least."""
    wide = W if W.dtype == torch.float64 else W.float()
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    root = S[:rank].sqrt()
    A, B = root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root
    columns = choose(scores(complement(U, S, Vh, rank, band), norm), count)
    return Factors(A.to(W.dtype).contiguous(), B.to(W.dtype).contiguous(), columns, W[:, columns].contiguous())


def cola(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """CoLA's start of A (r, I) and B (O, r): normal, scaled by r^(-1/4) (O + I)^(-1/4) (Lora-init `initialize_cola`)."""
    scale = (rank * sum(shape)) ** -0.25
    A = torch.randn(rank, shape[1], generator=generator) * scale
    return A, torch.randn(shape[0], rank, generator=generator) * scale

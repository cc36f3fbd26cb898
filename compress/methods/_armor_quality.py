"""ARMOR's quality mode: the error of the layer's output, with all covariances of its input. The loss never rises.

    minimise over A, B, S, mask    L = tr((A S B - W) C (A S B - W)ᵀ),    C (I, I) the second moment of the input

Not in the paper; diag(C) in place of C is its objective. The moves are those of `_armor_fast`. Columns are first
whitened inside each block, W_k K_k and B_k K_k with K_k K_kᵀ = C_kk, which leaves a C with identities on its diagonal: then A, the
groups of the core and the coordinates of the descent are as in the fast mode, with E C where that has E; B_k and the groups are
solved one k after the other, as C mixes them. The start is the better of two: the fast mode's solution for diag(C), and
SparseGPT's compensated core with A = B = I.
"""

from __future__ import annotations

import torch

from compress.methods._armor import Factors, Trace, left, reconstruct, right
from compress.methods._armor_fast import Plan, State, descend, dot, fast, fold, improve, round_, unfold
from compress.methods._masks import keep_n_of_m, normalise
from compress.methods._solvers import factorize
from compress.methods._sparse_solver import sparsify

BEGIN = Plan(restarts=4, last=0)  # of the fast mode, whose solution is the start
PLAN = Plan(rounds=1, restarts=12, steps=24, patience=5)


def damped(C: torch.Tensor, damp: float) -> torch.Tensor:
    """C (I, I) with `damp` of its mean diagonal added, inputs that were always 0 too."""
    C = C.clone()
    C.diagonal().add_(max(damp, 1e-6) * float(C.diagonal().mean(dtype=torch.float64)))
    return C


def padded(C: torch.Tensor, b: int) -> torch.Tensor:
    """C (I, I) beside a multiple of the identity, up to whole blocks of b inputs."""
    more = -len(C) % b
    return torch.block_diag(C, C.diagonal().mean() * torch.eye(more, dtype=C.dtype, device=C.device)) if more else C


def full_loss(f: Factors, W: torch.Tensor, C: torch.Tensor) -> float:
    """tr(E C Eᵀ), E = A S B - W, for W (O, I) and C (I, I)."""
    E = reconstruct(f) - W
    return dot(E, E @ C)


def whiten(C: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K (n1, b, b) lower with K_k K_kᵀ = C_kk, its inverse, and K⁻¹ C K⁻ᵀ (I, I)."""
    blocks = torch.stack([C[c : c + b, c : c + b] for c in range(0, len(C), b)]).double()
    K = torch.linalg.cholesky(blocks)
    inverse = torch.linalg.solve_triangular(K, torch.eye(b, dtype=K.dtype, device=K.device).expand_as(K), upper=False).to(C)
    white = right(left(inverse, C), inverse.transpose(1, 2))
    return K.to(C), inverse, (white + white.T) / 2


def nowag(W: torch.Tensor, C: torch.Tensor, b_out: int, b_in: int, n: int, m: int) -> Factors:
    """NoWag-P's mask on W (O, I) itself, A = B = I."""
    return _plain(W, keep_n_of_m(normalise(W).W.to(W).square() * C.diagonal(), n, m), b_out, b_in)


def compensated(W: torch.Tensor, C: torch.Tensor, b_out: int, b_in: int, n: int, m: int) -> Factors:
    """SparseGPT's core, A = B = I; C is damped already."""
    pruned = sparsify(W.float(), factorize(C.float().clone(), 0.0), nm=(n, m))
    return _plain(pruned.W.to(W), pruned.mask, b_out, b_in)


def _plain(W: torch.Tensor, mask: torch.Tensor, b_out: int, b_in: int) -> Factors:
    A, B = (torch.eye(b, dtype=W.dtype, device=W.device).repeat(d // b, 1, 1) for b, d in ((b_out, len(W)), (b_in, W.shape[1])))
    return Factors(A, B, W * mask, mask)


def refine(f: Factors, W: torch.Tensor, C: torch.Tensor, n: int, m: int, plan: Plan) -> tuple[Factors, list[float]]:
    """`f` improved on the loss with C (I, I), and the losses on the way."""
    b, size = f.B.shape[1], float(W.double().square().mean()) ** 0.5 or 1.0
    mean = float(C.diagonal().mean(dtype=torch.float64)) or 1.0
    K, inverse, white = whiten(C / mean, b)
    V = fold(right(W / size, K), b)
    s = State(f.A, f.B @ K, fold(f.S / size, b), fold(f.mask, b).clone())
    for _ in range(plan.rounds):
        round_(s, V, white, n, m)
    s = descend(s, V, white, n, m, plan.steps, plan)
    s, losses = improve(s, V, white, n, m, plan)
    S = (s.S * size).masked_fill(~s.mask, 0.0)
    return Factors(s.A, s.B @ inverse, unfold(S), unfold(s.mask)), [x * mean * size**2 for x in losses]


def quality(
    W: torch.Tensor, C: torch.Tensor, b_out: int, b_in: int, n: int = 2, m: int = 4, *,
    damp: float = 0.01, begin: Plan = BEGIN, plan: Plan = PLAN,
) -> tuple[Factors, Trace]:  # fmt: skip
    """The better start, improved on the whole covariance; the loss is at most the start's, SparseGPT's and NoWag-P's.

    W (O, I), C (I, I). Returns the factors, W ≈ A S B, and {"L0", "L_sparsegpt", "L_fast", "L_best", "losses"}: losses with the
    damped C, divided by tr(W C Wᵀ); L0 is NoWag-P's. `begin` is the plan of the fast mode before.
    """
    C = damped(C, damp)
    total = dot(W, W @ C) or 1.0
    starts = {
        "L0": nowag(W, C, b_out, b_in, n, m),
        "L_sparsegpt": compensated(W, C, b_out, b_in, n, m),
        "L_fast": fast(W, C.diagonal(), b_out, b_in, n, m, begin)[0],
    }
    losses = {name: full_loss(f, W, C) for name, f in starts.items()}
    name = min(losses, key=lambda x: losses[x])
    f, path = refine(starts[name], W, C, n, m, plan)
    end = full_loss(f, W, C)
    best, L_best = (f, end) if end <= losses[name] else (starts[name], losses[name])
    trace: Trace = {name: x / total for name, x in losses.items()}
    return best, {**trace, "L_best": L_best / total, "losses": [x / total for x in path]}

"""ARMOR: a 2:4 core between two block-diagonal wrappers; the pieces that every mode shares, and the paper's optimiser.

    minimise over A, B, S, mask    L = Σ_ij ((A S B - W_bar)_ij)² h_j,    A, B block-diagonal, S zero where the mask is

Source: ARMOR (arXiv 2510.05528; LawrenceRLiu/ARMOR `src/ARMOR_compress.py`: ARMOR_sparse_, sparse_core_step). W_bar (O, I) is the
normalised weight, h (I,) the activation energy. Losses that are reported are divided by Σ W_bar² h, so 1 is a matrix of zeros.
Where we differ: gradients are written out instead of taped, the emptied group's gradient comes from the full one, and the best
iterate is returned (the released code returns the last), so that the loss is at most NoWag-P's, which is the start.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from compress.methods._masks import keep_n_of_m

RIDGE, FLOOR = 1e-9, 1e-8  # added to the Gram matrix of a support and to a squared column norm of A (`sparse_core_step`)
FIRST = 0.3  # of the gradient, L-BFGS's step before any curvature is known, in coordinates of about unit curvature
PATIENCE, RTOL, ATOL = 100, 1e-6, 1e-8  # iterations without a gain over the one before, of at least so much
Trace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Factors:
    """W_bar ≈ blockdiag(A) S blockdiag(B)."""

    A: torch.Tensor  # (n0, b_out, b_out)
    B: torch.Tensor  # (n1, b_in, b_in)
    S: torch.Tensor  # (O, I), 0 where the mask is False
    mask: torch.Tensor  # (O, I) bool, n of every m columns


def block_size(dim: int, at_most: int = 128, multiple: int = 4) -> int:
    """The largest divisor of `dim` that is at most `at_most` and a multiple of `multiple`; 0 if there is none."""
    return max((b for b in range(multiple, min(dim, at_most) + 1, multiple) if dim % b == 0), default=0)


def any_size(dim: int, at_most: int = 128, multiple: int = 4, ragged: bool = False) -> int:
    """`block_size`, or, where that is less than half of what was asked (with `ragged` always), a size that need not divide."""
    whole, wanted = block_size(dim, at_most, multiple), min(dim, at_most) // multiple * multiple
    return wanted if ragged or 2 * whole < wanted else whole


def padded(W: torch.Tensor, b_out: int, b_in: int) -> torch.Tensor:
    """W (O, I) with zeros to whole blocks.

    No optimiser here moves a factor towards them: a zero target leaves the core's padding 0, and A's and B's the identity.
    """
    return torch.nn.functional.pad(W, (0, -W.shape[1] % b_in, 0, -W.shape[0] % b_out))


def left(A: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """blockdiag(A) X, for A (n0, b, b) and X (O, I)."""
    n0, b, _ = A.shape
    return torch.bmm(A, X.reshape(n0, b, X.shape[1])).view(X.shape)


def right(X: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """X blockdiag(B), for X (O, I) and B (n1, b, b)."""
    n1, b, _ = B.shape
    return torch.bmm(X.view(-1, n1, b).transpose(0, 1), B).transpose(0, 1).reshape(X.shape)


def left_gram(X: torch.Tensor, Y: torch.Tensor, b: int) -> torch.Tensor:
    """The diagonal blocks of X Yᵀ, (n0, b, b), for X, Y (O, I)."""
    return torch.bmm(X.view(-1, b, X.shape[1]), Y.view(-1, b, Y.shape[1]).transpose(1, 2))


def right_gram(X: torch.Tensor, Y: torch.Tensor, b: int) -> torch.Tensor:
    """The diagonal blocks of Xᵀ Y, (n1, b, b), for X, Y (O, I)."""
    return torch.bmm(X.view(len(X), -1, b).permute(1, 2, 0), Y.view(len(Y), -1, b).transpose(0, 1))


def reconstruct(f: Factors) -> torch.Tensor:
    """W_bar as the factors have it, (O, I)."""
    return left(f.A, right(f.S, f.B))


def scale(W_bar: torch.Tensor, h: torch.Tensor) -> float:
    """Σ W_bar² h, the loss of a matrix of zeros; 1 where W_bar is one."""
    return float((W_bar.double().square() @ h.double()).sum()) or 1.0


def loss(f: Factors, W_bar: torch.Tensor, h: torch.Tensor) -> float:
    """Σ (A S B - W_bar)² h over W_bar (O, I), h (I,)."""
    return float(((reconstruct(f) - W_bar).double().square() @ h.double()).sum())


def relative_loss(f: Factors, W_bar: torch.Tensor, h: torch.Tensor) -> float:
    """`loss` divided by that of a matrix of zeros."""
    return loss(f, W_bar, h) / scale(W_bar, h)


def start(W_bar: torch.Tensor, h: torch.Tensor, b_out: int, b_in: int, n: int, m: int) -> Factors:
    """NoWag-P: A and B are the identity, and the n of every m weights with the largest W_bar² h stay."""
    O, I = W_bar.shape
    mask = keep_n_of_m(W_bar.square() * h, n, m)
    A, B = (torch.eye(b, dtype=W_bar.dtype, device=W_bar.device).repeat(d // b, 1, 1) for b, d in ((b_out, O), (b_in, I)))
    return Factors(A, B, W_bar * mask, mask)


def support_inverses(Q: torch.Tensor, n: int, ridge: float | torch.Tensor = RIDGE) -> torch.Tensor:
    """The inverse of every n x n principal submatrix of Q (..., m, m), at its place among zeros: (..., C(m, n), m, m)."""
    m = Q.shape[-1]
    supports = torch.tensor(list(itertools.combinations(range(m), n)), device=Q.device)  # (C, n)
    rows, columns = supports.unsqueeze(2), supports.unsqueeze(1)
    G = Q[..., rows, columns] + ridge * torch.eye(n, dtype=Q.dtype, device=Q.device)
    L, failed = torch.linalg.cholesky_ex(G)
    inverse = torch.cholesky_inverse(L).masked_fill_((failed != 0)[..., None, None], 0.0)  # such a support is worth nothing
    out = Q.new_zeros(*Q.shape[:-2], len(supports), m, m)
    index = torch.arange(len(supports), device=Q.device).view(-1, 1, 1)
    out[..., index, rows, columns] = inverse
    return out


def best_support(v: torch.Tensor, inverses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimise s Q sᵀ + 2 v·s over n-sparse s, for v (N, R, m) and the `inverses` (N, C, m, m) of N different Q.

    Returns s (N, R, m), the number of its support (N, R), and the minimum (N, R), which is at most 0.
    """
    N, R, m = v.shape
    u = (v @ inverses.transpose(1, 2).reshape(N, m, -1)).view(N, R, -1, m)
    gain, which = (u * v.unsqueeze(2)).sum(3).max(2)
    return u.gather(2, which[..., None, None].expand(N, R, 1, m)).squeeze(2).neg_(), which, -gain


def support_masks(n: int, m: int, device: torch.device) -> torch.Tensor:
    """(C(m, n), m) bool, in the order of `support_inverses`."""
    supports = torch.tensor(list(itertools.combinations(range(m), n)), device=device)
    return torch.zeros(len(supports), m, dtype=torch.bool, device=device).scatter_(1, supports, True)


def _choose(G: torch.Tensor, b_out: int, b_in: int, m: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and first column, (n0 n1,) each, of one group per block, drawn with the L1 norm of its gradient G (O, I)."""
    O, I = G.shape
    n0, n1, groups = O // b_out, I // b_in, b_in // m
    norms = G.abs().view(n0, b_out, n1, groups, m).sum(-1).transpose(1, 2).reshape(n0 * n1, b_out * groups)
    drawn = torch.multinomial(norms.cpu() + 1e-30, 1, generator=generator).squeeze(1).to(G.device)
    block = torch.arange(n0 * n1, device=G.device)
    return block // n1 * b_out + drawn // groups, block % n1 * b_in + drawn % groups * m


def core_step(
    f: Factors, G: torch.Tensor, BD: torch.Tensor, row: torch.Tensor, column: torch.Tensor, n: int, m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Solve the groups at `row`, `column` (N,), at most one per block, exactly, over all C(m, n) supports.

    G (O, I) is half the gradient Aᵀ (A S B - W_bar) D² Bᵀ and BD (n1, b, b) is B D. Returns the groups' new values (N, m), kept
    entries (N, m) bool, and how much lower than with the group emptied each makes the loss, as a number <= 0 (N,).
    """
    b_out, b_in = f.A.shape[1], f.B.shape[1]
    a = f.A[row // b_out, :, row % b_out]  # (N, b_out)
    norm = a.square().sum(1, keepdim=True)
    columns = column.unsqueeze(1) + torch.arange(m, device=row.device)
    rows = row.unsqueeze(1)
    Bc = BD[(column // b_in).unsqueeze(1), columns % b_in]  # (N, m, b_in)
    Q = Bc @ Bc.transpose(1, 2)
    v = G[rows, columns] - norm * (f.S[rows, columns].unsqueeze(1) @ Q).squeeze(1)
    s, which, cost = (x.squeeze(1) for x in best_support(v.unsqueeze(1), support_inverses(Q, n)))
    return s / (norm + FLOOR), support_masks(n, m, row.device)[which], cost / norm.squeeze(1)


def paper(
    W_bar: torch.Tensor, h: torch.Tensor, b_out: int, b_in: int, n: int = 2, m: int = 4, *,
    iters: int = 20_000, lr: float = 1e-4, seed: int = 0,
) -> tuple[Factors, Trace]:  # fmt: skip
    """The paper's alternation: one joint Adam step on A, B and the dense core, then one group of every block solved exactly.

    Returns the best iterate and {"L0", "L_best", "losses"}, `losses` after every iteration, all relative.
    """
    f = start(W_bar, h, b_out, b_in, n, m)
    A, B, X, mask = f.A.clone(), f.B.clone(), f.S.clone(), f.mask.clone()  # X is dense: what leaves the mask keeps drifting
    generator = torch.Generator().manual_seed(seed)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (A, B, X)]
    total, root = scale(W_bar, h), h.sqrt()
    S = X * mask
    Z = right(S, B)
    E = left(A, Z) - W_bar
    L0 = best = previous = loss(f, W_bar, h) / total
    losses: list[float] = []
    patience = PATIENCE
    for step in range(1, iters + 1):
        G = E * (h * (2 / total))
        U = left(A.transpose(1, 2), G)
        gradients = left_gram(G, Z, b_out), right_gram(S, U, b_in), right(U, B.transpose(1, 2)).mul_(mask)
        for p, g, moment in zip((A, B, X), gradients, moments, strict=True):
            _adam(p, g, *moment, lr, step)
        S = X * mask
        Z = right(S, B)
        E = left(A, Z) - W_bar
        BD = B * root.view(-1, 1, b_in)
        G = right(left(A.transpose(1, 2), E * h), B.transpose(1, 2))
        row, column = _choose(G, b_out, b_in, m, generator)
        s, kept, _ = core_step(Factors(A, B, S, mask), G, BD, row, column, n, m)
        _replace(X, S, mask, row.unsqueeze(1), column.unsqueeze(1) + torch.arange(m, device=row.device), s, kept)
        Z = right(S, B)
        E = left(A, Z) - W_bar
        now = float((E.square() @ h).sum()) / total
        losses.append(now)
        if now < best:
            best, f = now, Factors(A.clone(), B.clone(), S.clone(), mask.clone())
        patience = patience - 1 if now > (1 - RTOL) * previous or now > previous - ATOL else PATIENCE
        previous = now
        if patience == 0:
            break
    return f, {"L0": L0, "L_best": best, "losses": losses}


def _adam(p: torch.Tensor, g: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, lr: float, step: int) -> None:
    """One step on p, in place, with torch's default betas and eps (and without the seconds that importing torch.optim takes)."""
    mean.lerp_(g, 0.1)
    square.mul_(0.999).addcmul_(g, g, value=0.001)
    p.addcdiv_(mean, (square.sqrt() / (1 - 0.999**step) ** 0.5).add_(1e-8), value=-lr / (1 - 0.9**step))


def _replace(
    X: torch.Tensor, S: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, s: torch.Tensor,
    kept: torch.Tensor,
) -> None:  # fmt: skip
    """Write groups (N, m) into the dense core X, the core S and the mask, (O, I) each; X is left alone where nothing is kept."""
    X[rows, columns] = torch.where(kept, s, X[rows, columns])
    S[rows, columns] = s
    mask[rows, columns] = kept


class Curvature:
    """The last few steps and changes of the gradient, as L-BFGS uses them (Nocedal and Wright, algorithm 7.4)."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        """The inverse Hessian, as far as it is known, times g."""
        q, shares = g.clone(), []
        for s, y, r in reversed(self.pairs):
            shares.append(r * float(s.dot(q)))
            q.add_(y, alpha=-shares[-1])
        if self.pairs:
            _, y, r = self.pairs[-1]
            q.div_(r * float(y.dot(y)))
        else:
            q.mul_(FIRST)
        for s, y, r in self.pairs:
            q.add_(s, alpha=shares.pop() - r * float(y.dot(q)))
        return q

    def learn(self, s: torch.Tensor, y: torch.Tensor) -> None:
        product = float(s.dot(y))
        if product > 1e-10 * float(y.dot(y)):
            self.pairs = [*self.pairs, (s, y, 1 / product)][-self.memory :]

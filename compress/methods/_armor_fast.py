"""ARMOR's fast mode: closed-form wrappers, every group of the core at once, L-BFGS between the sweeps, restarts of the core.

    minimise over A, B, S, mask    ||A S B - W||²,    W = W_bar D,  B standing for B D,  D = diag(sqrt h)

Not in the paper. Three moves, each of which lowers L or changes nothing, and a fourth that is taken back if it did not pay:
  wrappers  A_j = (Σ_k W_jk Z_jkᵀ)(Σ_k Z_jk Z_jkᵀ)⁻¹ with Z = S B, and B_k = (Y_kᵀY_k)⁻¹ Y_kᵀ W_k with Y = A S; a block whose loss
            would rise stays.
  sweep     one column group after another, all its rows in all (j, k) blocks at once. Half the gradient is Γ = Aᵀ(A S B - W)Bᵀ; for
            P = AᵀA, Q = BBᵀ a group's exact solution needs Γ, P_rr and Q_cc only. Rows share P, so a block's change
            2<Γ, δ> + tr(P δ Q_cc δᵀ) is tested; where it is positive the rows are solved in halves, and in halves again.
  descent   L-BFGS on A, B and the kept values together, in coordinates where each of them alone is about equally curved in all
            directions: A R and LᵀB with R, L Cholesky factors of the Grams above, columns of A and rows of B of unit norm. Steps
            that do not lower L enough are shortened. Every few steps a sweep chooses the support anew; the curvature survives it.
  restart   the supports so reached are good for weights that stay put; better ones are found by pruning the dense core
            T = A⁻¹ W B⁻¹ anew, column by column with SparseGPT's compensation under Q, from the left and from the right by turns.
            Wrappers and descent follow; the best state of the chain is kept.
Blocks lie as (n1, O, b): `fold`. Everything is batched over the (j, k) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.methods._armor import (
    Curvature,
    Factors,
    Trace,
    best_support,
    left,
    loss,
    right,
    scale,
    start,
    support_inverses,
    support_masks,
)  # fmt: skip
from compress.methods._masks import keep_n_of_m
from compress.methods._solvers import factorize
from compress.methods._sparse_solver import sparsify

_RIDGE = 1e-7  # of the mean diagonal, added to a Gram matrix before it is factorized
_ARMIJO, _SHORTER, _TRIES = 1e-4, 0.4, 6  # a step must give this share of what its slope promises, or is shortened, so many times
_TINY = 1e-20  # under a norm that is divided by
_PARTS = 4  # rows of a block are tried in parts of at least 1/4


@dataclass(frozen=True, slots=True)
class Plan:
    """How long."""

    rounds: int = 5  # of wrappers and a sweep, at the start
    restarts: int = 16  # at most
    steps: int = 16  # of descent before the first restart and after each
    patience: int = 3  # restarts in a row that may fail to find a better state
    last: int = 200  # steps of descent after the last
    every: int = 8  # steps between two sweeps
    memory: int = 5  # pairs of vectors that L-BFGS remembers


@dataclass(slots=True)
class State:
    """A (n0, a, a), B (n1, b, b) with D inside, S (n1, O, b) and mask (n1, O, b) bool, for W (n1, O, b)."""

    A: torch.Tensor
    B: torch.Tensor
    S: torch.Tensor
    mask: torch.Tensor


def fold(X: torch.Tensor, b: int) -> torch.Tensor:
    """(O, I) as (n1, O, b)."""
    return X.view(len(X), -1, b).transpose(0, 1).contiguous()


def unfold(X: torch.Tensor) -> torch.Tensor:
    """(n1, O, b) as (O, I)."""
    return X.transpose(0, 1).reshape(X.shape[1], -1)


def rows(A: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """blockdiag(A) X for A (n0, a, a) and X (n1, O, c)."""
    n1, O, c = X.shape
    n0, a, _ = A.shape
    return torch.matmul(A, X.reshape(n1, n0, a, c)).view(n1, O, c)


def gram(X: torch.Tensor, Y: torch.Tensor, n0: int) -> torch.Tensor:
    """Σ_k X_jk Y_jkᵀ, (n0, a, a), for X, Y (n1, O, b)."""
    n1, O, b = X.shape
    return torch.matmul(X.view(n1, n0, O // n0, b), Y.view(n1, n0, O // n0, b).transpose(2, 3)).sum(0)


def weigh(E: torch.Tensor, C: torch.Tensor | None) -> torch.Tensor:
    """E C for E (n1, O, b) and C (I, I); None is the identity."""
    return E if C is None else fold(unfold(E) @ C, E.shape[2])


def value(s: State, W: torch.Tensor, C: torch.Tensor | None = None) -> float:
    """tr(E C Eᵀ) for E = A S B - W."""
    E = rows(s.A, s.S @ s.B).sub_(W)
    return dot(E, weigh(E, C))


def dot(x: torch.Tensor, y: torch.Tensor) -> float:
    """Σ x y, the sum over the rows in fp64."""
    return float((x * y).sum(-1).sum(dtype=torch.float64))


def cholesky(G: torch.Tensor) -> torch.Tensor:
    """Lower factors of (n, b, b) Gram matrices, with a ridge that grows until all of them have one."""
    ridge = _RIDGE * G.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(G.dtype).tiny)
    for _ in range(12):
        L, failed = torch.linalg.cholesky_ex(G + torch.diag_embed(ridge.unsqueeze(1).expand(G.shape[:2])))
        if not failed.any():
            break
        ridge = torch.where(failed != 0, ridge * 10, ridge)
    return L


def _newton(X: torch.Tensor, g: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """X - g G⁻¹, the minimum of a quadratic with gradient g and curvature G, (n, b, b) all; X itself where rounding is worse."""
    step = torch.cholesky_solve(g.transpose(1, 2), cholesky(G)).transpose(1, 2)
    good = ((step @ G - 2 * g) * step).sum((1, 2), dtype=torch.float64) <= 0
    return torch.where(good[:, None, None], X - step, X)


def solve_A(s: State, W: torch.Tensor, C: torch.Tensor | None = None) -> torch.Tensor:
    """The best A (n0, a, a) for B and S."""
    Z = s.S @ s.B
    F = weigh(rows(s.A, Z).sub_(W), C)
    return _newton(s.A, gram(F, Z, len(s.A)), gram(weigh(Z, C), Z, len(s.A)))


def solve_B(s: State, W: torch.Tensor, C: torch.Tensor | None = None) -> torch.Tensor:
    """The best B (n1, b, b) for A and S; with C, whose diagonal blocks are identities, one B_k after the other."""
    Y = rows(s.A, s.S)
    F, G = weigh((Y @ s.B).sub_(W), C), Y.transpose(1, 2) @ Y
    if C is None:
        g = Y.transpose(1, 2) @ F
        return _newton(s.B.transpose(1, 2), g.transpose(1, 2), G).transpose(1, 2).contiguous()
    n1, _, b = W.shape
    B = s.B.clone()
    for k in range(n1):
        g = F[k].T @ Y[k]
        new = _newton(B[k : k + 1].transpose(1, 2), g.unsqueeze(0), G[k : k + 1])[0].T
        change = Y[k] @ (new - B[k])
        F[k + 1 :] += fold(change @ C[k * b : (k + 1) * b, (k + 1) * b :], b) if k + 1 < n1 else 0.0
        B[k] = new
    return B


def group_step(
    Gc: torch.Tensor, Sc: torch.Tensor, P: torch.Tensor, Q: torch.Tensor, inverses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Solve one column group of N blocks, all a rows at once; rows by halves in the blocks where that would raise the loss.

    Gc, Sc (N, a, m) half the gradient and the values; P (N, a, a), Q (N, m, m), inverses (N, C, m, m). Returns δ (N, a, m), P δ,
    and the support that each row has now (N, a), -1 where it keeps the one it has.
    """
    a = Sc.shape[1]
    p = P.diagonal(dim1=1, dim2=2).unsqueeze(2).clamp_min(_TINY)
    d, Pd, which, bad = _solved(Gc, Sc, P, p, Q, inverses)
    todo = [(0, a, bad)] if len(bad) else []
    while todo:
        low, high, i = todo.pop()
        if high - low <= max(1, a // _PARTS):
            continue
        middle = (low + high) // 2
        for low_, high_ in ((low, middle), (middle, high)):
            part = slice(low_, high_)
            g, s = Gc[i, part] + Pd[i, part] @ Q[i], Sc[i, part]
            e, Pe, w, bad = _solved(g, s, P[i][:, :, part], p[i, part], Q[i], inverses[i], low_)
            d[i, part], which[i, part] = e, w
            Pd[i] += Pe
            if len(bad):
                todo.append((low_, high_, i[bad]))
    return d, Pd, which


def _solved(
    g: torch.Tensor, s: torch.Tensor, P: torch.Tensor, p: torch.Tensor, Q: torch.Tensor, inverses: torch.Tensor, low: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """δ, P δ and supports of r rows from `low` on, all 0 and -1 in the blocks where they would raise the loss; and those blocks."""
    e, w, _ = best_support(torch.addcmul(g, p, s @ Q, value=-1), inverses)
    e = e.div_(p).sub_(s)
    Pe = P @ e
    bad = ((2 * g * e + Pe[:, low : low + e.shape[1]] * (e @ Q)).sum((1, 2)) > 0).nonzero().squeeze(1)
    e[bad], Pe[bad], w[bad] = 0.0, 0.0, -1
    return e, Pe, w, bad


def group_blocks(
    G: torch.Tensor, S: torch.Tensor, mask: torch.Tensor, P: torch.Tensor, Q: torch.Tensor, n: int, m: int
) -> torch.Tensor:  # fmt: skip
    """Visit every column group of the blocks once; G, S, mask (k, O, b) in place, for P (n0, a, a) and Q (k, b, b). Returns P Δ."""
    k, O, b = G.shape
    n0, a, _ = P.shape
    masks = support_masks(n, m, G.device)
    diagonal = torch.stack([Q[:, c : c + m, c : c + m] for c in range(0, b, m)])  # (b/m, k, m, m)
    inverses = support_inverses(diagonal, n, _RIDGE * Q.diagonal(dim1=1, dim2=2).mean(1)[None, :, None, None, None])
    G_, S_, mask_, P = G.view(-1, a, b), S.view(-1, a, b), mask.view(-1, a, b), P.repeat(k, 1, 1)
    moved = torch.empty_like(G)
    for c in range(0, b, m):
        q, inverse = (x[c // m].repeat_interleave(n0, 0) for x in (diagonal, inverses))
        d, Pd, which = group_step(G_[:, :, c : c + m], S_[:, :, c : c + m], P, q, inverse)
        kept = torch.where((which >= 0).unsqueeze(2), masks[which], mask_[:, :, c : c + m])
        mask_[:, :, c : c + m] = kept
        S_[:, :, c : c + m] += d
        S_[:, :, c : c + m] *= kept
        moved[:, :, c : c + m] = Pd.view(k, O, m)
        G[:, :, c:].baddbmm_(moved[:, :, c : c + m], Q[:, c : c + m, c:])  # groups before this one are done
    return moved


def sweep(s: State, W: torch.Tensor, C: torch.Tensor | None, n: int, m: int) -> None:
    """Visit every group of the core once, in place. With C one k follows the other, as E C mixes them."""
    At, Bt = s.A.transpose(1, 2), s.B.transpose(1, 2)
    P = At @ s.A
    G = rows(At, weigh(rows(s.A, s.S @ s.B).sub_(W), C)) @ Bt
    if C is None:
        group_blocks(G, s.S, s.mask, P, s.B @ Bt, n, m)
        return
    n1, O, b = W.shape
    for k in range(n1):
        H = (s.B[k] @ C[k * b : (k + 1) * b, k * b :]).view(b, -1, b).transpose(0, 1) @ Bt[k:]  # (n1 - k, b, b)
        moved = group_blocks(G[k : k + 1], s.S[k : k + 1], s.mask[k : k + 1], P, H[:1], n, m)
        G[k + 1 :].baddbmm_(moved.expand(n1 - k - 1, O, b), H[1:])


def unit(s: State) -> None:
    """Move the norms of A's columns and B's rows into S, in place."""
    columns, lines = (x.clamp_min(_TINY) for x in (torch.linalg.vector_norm(s.A, dim=1), torch.linalg.vector_norm(s.B, dim=2)))
    s.A, s.B = s.A / columns.unsqueeze(1), s.B / lines.unsqueeze(2)
    s.S *= columns.view(1, -1, 1) * lines.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Frame:
    """Coordinates of a state as one vector: A R, then LᵀB, then S, for lower Cholesky factors R of Z C Zᵀ and L of YᵀY."""

    R: torch.Tensor  # (n0, a, a)
    L: torch.Tensor  # (n1, b, b)

    @classmethod
    def at(cls, s: State, C: torch.Tensor | None) -> Frame:
        Z, Y = s.S @ s.B, rows(s.A, s.S)
        return cls(cholesky(gram(weigh(Z, C), Z, len(s.A))), cholesky(Y.transpose(1, 2) @ Y))

    def to(self, s: State) -> torch.Tensor:
        return join(s.A @ self.R, self.L.transpose(1, 2) @ s.B, s.S)

    def back(self, x: torch.Tensor, mask: torch.Tensor) -> State:
        """The state at x; its S is a view of x."""
        A, B, S = x.split([self.R.numel(), self.L.numel(), mask.numel()])
        return State(
            torch.linalg.solve_triangular(self.R, A.view_as(self.R), upper=False, left=False),
            torch.linalg.solve_triangular(self.L.transpose(1, 2), B.view_as(self.L), upper=True), S.view(mask.shape), mask,
        )  # fmt: skip

    def gradient(self, x: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, C: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        """Half of tr(E C Eᵀ) at x, and its gradient there; 0 where the mask is."""
        s = self.back(x, mask)
        Z = s.S @ s.B
        E = rows(s.A, Z).sub_(W)
        F = weigh(E, C)
        U = rows(s.A.transpose(1, 2), F)
        gA = torch.linalg.solve_triangular(self.R.transpose(1, 2), gram(F, Z, len(s.A)), upper=True, left=False)
        gB = torch.linalg.solve_triangular(self.L, s.S.transpose(1, 2) @ U, upper=False)
        return dot(E, F) / 2, join(gA, gB, (U @ s.B.transpose(1, 2)).mul_(mask))


def join(*parts: torch.Tensor) -> torch.Tensor:
    """All of them as one vector."""
    return torch.cat([p.reshape(-1) for p in parts])


def descend(s: State, W: torch.Tensor, C: torch.Tensor | None, n: int, m: int, steps: int, plan: Plan) -> State:
    """At most `steps` L-BFGS steps on A, B and the kept values, with sweeps between them."""
    if steps == 0:
        return s
    s = State(s.A, s.B, s.S.clone(), s.mask.clone())
    unit(s)
    frame, curvature = Frame.at(s, C), Curvature(plan.memory)
    x = frame.to(s)
    f, g = frame.gradient(x, s.mask, W, C)
    for step in range(1, steps + 1):
        q = curvature.direction(g)
        q[-s.mask.numel() :].mul_(s.mask.view(-1))
        slope, length = float(g.dot(q)), 1.0
        for _ in range(_TRIES if slope > 0 else 0):
            new = x.add(q, alpha=-length)
            now, there = frame.gradient(new, s.mask, W, C)
            if now <= f - _ARMIJO * length * slope:
                curvature.learn(new - x, there - g)
                x, f, g = new, now, there
                break
            length *= _SHORTER
        else:
            if not curvature.pairs:
                break
            curvature.pairs = []
        if step % plan.every == 0 or step == steps:
            s = frame.back(x, s.mask)
            sweep(s, W, C, n, m)
            x = frame.to(s)
            f, g = frame.gradient(x, s.mask, W, C)
    return frame.back(x, s.mask)


def dense_core(s: State, W: torch.Tensor) -> torch.Tensor:
    """T = A⁻¹ W B⁻¹ (n1, O, b), with a small ridge: the core that would lose nothing."""
    At, Bt = s.A.transpose(1, 2), s.B.transpose(1, 2)
    n1, O, b = W.shape
    N = (rows(At, W) @ Bt).view(n1, len(s.A), -1, b)
    X = torch.cholesky_solve(N, cholesky(At @ s.A)).reshape(n1, O, b).transpose(1, 2)
    return torch.cholesky_solve(X, cholesky(s.B @ Bt)).transpose(1, 2).contiguous()


def compensate(T: torch.Tensor, Q: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune T (k, O, b) to n of m with SparseGPT's errors under Q (k, b, b), all k at once: S and mask (k, O, b)."""
    k, O, b = T.shape
    L = cholesky(Q.flip(1, 2)).flip(1, 2)  # upper; Q = L Lᵀ, so that L⁻¹ is the factor of the inverse
    U = torch.linalg.solve_triangular(L, torch.eye(b, dtype=T.dtype, device=T.device).expand_as(L), upper=True)
    diagonal = U.diagonal(dim1=1, dim2=2)
    V, kept = T.clone(), torch.ones_like(T, dtype=torch.bool)
    for c in range(b):
        if c % m == 0:
            score = V[:, :, c : c + m] / diagonal[:, None, c : c + m]
            kept[:, :, c : c + m] = keep_n_of_m(score.square().view(k * O, m), n, m).view(k, O, m)
        e = V[:, :, c] * ~kept[:, :, c] / diagonal[:, c : c + 1]
        V[:, :, c] *= kept[:, :, c]
        V[:, :, c + 1 :] -= e.unsqueeze(2) * U[:, c : c + 1, c + 1 :]
    return V, kept


def restart(s: State, W: torch.Tensor, C: torch.Tensor | None, n: int, m: int, backwards: bool) -> State:
    """The same wrappers with a new core, pruned from the first column to the last or the other way round."""
    T, b = dense_core(s, W), W.shape[2]
    if C is None:
        Q = s.B @ s.B.transpose(1, 2)
        S, mask = compensate(T.flip(2), Q.flip(1, 2), n, m) if backwards else compensate(T, Q, n, m)
        return State(s.A, s.B, *((S.flip(2), mask.flip(2)) if backwards else (S, mask)))
    H, T = right(left(s.B, C), s.B.transpose(1, 2)), unfold(T)
    H = (H + H.T) / 2
    pruned = sparsify(T.flip(1) if backwards else T, factorize(H.flip(0, 1) if backwards else H, _RIDGE), nm=(n, m))
    S, mask = ((x.flip(1) if backwards else x) for x in (pruned.W * pruned.mask, pruned.mask))
    return State(s.A, s.B, fold(S, b), fold(mask, b))


def round_(s: State, W: torch.Tensor, C: torch.Tensor | None, n: int, m: int) -> None:
    """Wrappers and a sweep, in place."""
    s.A = solve_A(s, W, C)
    s.B = solve_B(s, W, C)
    sweep(s, W, C, n, m)


def improve(s: State, W: torch.Tensor, C: torch.Tensor | None, n: int, m: int, plan: Plan) -> tuple[State, list[float]]:
    """Restarts, each followed by descent; from the best state a long descent and a round; and the loss after each. Uses up `s`."""
    best, losses, least = s, [value(s, W, C)], 0
    for i in range(plan.restarts):
        s = restart(s, W, C, n, m, i % 2 == 0)
        round_(s, W, C, n, m)
        s = descend(s, W, C, n, m, plan.steps, plan)
        losses.append(value(s, W, C))
        if losses[-1] < losses[least]:
            best, least = s, i + 1
        elif i + 1 - least >= plan.patience:
            break
    s = descend(best, W, C, n, m, plan.last, plan)
    losses.append(value(s, W, C))
    round_(s, W, C, n, m)
    losses.append(value(s, W, C))
    return s, losses


def fast(
    W_bar: torch.Tensor, h: torch.Tensor, b_out: int, b_in: int, n: int = 2, m: int = 4, plan: Plan | None = None
) -> tuple[Factors, Trace]:  # fmt: skip
    """Rounds and a descent from NoWag-P, then `improve`; the loss is at most NoWag-P's, the start.

    W_bar (O, I), h (I,). Returns the factors and {"L0", "L_best", "losses"}: after the first descent, after every restart, after
    the last descent, and at the end, all relative.
    """
    plan = plan or Plan()
    f = start(W_bar, h, b_out, b_in, n, m)
    total, L0 = scale(W_bar, h), loss(f, W_bar, h)
    root = h.clamp_min(float(h.mean()) * 1e-12).sqrt()
    size = (total / W_bar.numel()) ** 0.5
    W = fold(W_bar * (root / size), b_in)
    s = State(f.A, f.B * root.view(-1, 1, b_in), fold(f.S / size, b_in), fold(f.mask, b_in).clone())
    for _ in range(plan.rounds):
        round_(s, W, None, n, m)
    s = descend(s, W, None, n, m, plan.steps, plan)
    s, losses = improve(s, W, None, n, m, plan)
    S = (s.S * size).masked_fill(~s.mask, 0.0)
    g = Factors(s.A, s.B / root.view(-1, 1, b_in), unfold(S), unfold(s.mask))
    end = loss(g, W_bar, h)
    return g if end <= L0 else f, {"L0": L0 / total, "L_best": min(end, L0) / total, "losses": [x / W.numel() for x in losses]}

"""A weight as a product of thin factors and some whole columns, exactly: W ≈ B A P_J + R P_I, in fp64.

    minimise   tr((W - L - R P_I) C (W - L - R P_I)ᵀ),     rank(L) <= r, |I| = s,  J the other columns

C (I, I) is the second moment of the inputs; its diagonal gives column scaling, the identity the plain Frobenius norm. With I given
the optimum is closed: R absorbs what it can, which leaves M_I = W C Wᵀ - P_I C_II⁻¹ P_Iᵀ with P = W C (the Schur complement
C_JJ - C_JI C_II⁻¹ C_IJ seen from the outputs); U are its r leading eigenvectors, and

    L_J = U Uᵀ W_J,   L_I = 0,   R = W_I + (1 - U Uᵀ)(P_I C_II⁻¹ - W_I),   error = the sum of M_I's other eigenvalues.

Outputs whose errors count differently are rows that are scaled before and scaled back after.

No inverse of C is taken, so a nearly singular one does no harm. A tall W is first turned by an orthogonal matrix, which changes
no error, so that eigenproblems have min(O, I) rows. Which columns: scores, or one by one by exact gain. The derivation is ours; for
s = 0 it is the whitened SVD of SVD-LLM (arXiv 2403.07378), for C = 1 and a score of LOST (arXiv 2508.02668) the concentration step
of trimmed principal components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.errors import CompressError

SELECTORS = ("lost", "diag", "obs", "weight", "greedy")
FLOOR = 1e-8  # least pivot of what is left of C, as a share of its diagonal
_TRIES = 12


@dataclass(frozen=True, slots=True)
class Moment:
    """Second moment of a linear's inputs, mean diagonal 1: (I, I), or its diagonal (I,). Dead inputs have 1 and are last."""

    C: torch.Tensor
    dead: torch.Tensor  # (I,) bool
    damp: float = 0.0  # share of the mean diagonal that was added
    scale: float = 1.0  # what the mean diagonal was

    @property
    def diagonal(self) -> torch.Tensor:
        return self.C if self.C.dim() == 1 else self.C.diagonal()

    def after(self, W: torch.Tensor) -> torch.Tensor:
        """W C (…, I)."""
        return W * self.C if self.C.dim() == 1 else W @ self.C

    def inner(self, columns: torch.Tensor) -> torch.Tensor:
        """C_II (s, s)."""
        if self.C.dim() == 1:
            return torch.diag(self.C[columns])
        return self.C[columns][:, columns]


def moment(C: torch.Tensor, damp: float = 0.0, name: str = "") -> Moment:
    """The moment of C (I, I) or of its diagonal (I,), scaled to a mean of 1 and damped until it is positive definite."""
    C = C.to(torch.float64, copy=True)
    diagonal = C if C.dim() == 1 else C.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        raise CompressError(f"{name}: its inputs are 0 on the calibration text", hint="--ignore it, or use --weighting none")
    scale = float(diagonal[~dead].mean())
    C.div_(scale)
    if C.dim() == 1:
        C[dead] = 1.0
        return Moment(C + damp, dead, damp, scale)
    C.diagonal()[dead] = 1.0
    total = damp
    C.diagonal().add_(damp)
    for _ in range(_TRIES):
        if not int(torch.linalg.cholesky_ex(C)[1]):
            return Moment(C, dead, total, scale)
        step = max(total, 1e-6)  # doubles
        C.diagonal().add_(step)
        total += step
    raise CompressError(
        f"{name}: the second moment of its inputs stays indefinite with {total:.3g} of its mean diagonal added",
        hint="use more calibration tokens (--nsamples), or a larger --damp",
    )


def plain(inputs: int, device: torch.device | str = "cpu") -> Moment:
    """C = 1."""
    return Moment(torch.ones(inputs, dtype=torch.float64, device=device), torch.zeros(inputs, dtype=torch.bool, device=device))


@dataclass(frozen=True, slots=True)
class Factors:
    """B (O, r), A (r, I - s) over the other columns in their order, R (O, s), columns (s,) sorted int64, and the error."""

    B: torch.Tensor
    A: torch.Tensor
    R: torch.Tensor
    columns: torch.Tensor
    error: float  # of the objective, relative to that of an all-zero weight

    @property
    def rank(self) -> int:
        return int(self.B.shape[1])

    def dense(self) -> torch.Tensor:
        """W_hat (O, I)."""
        W = self.B.new_empty(self.B.shape[0], self.A.shape[1] + len(self.columns))
        W[:, others(self.columns, W.shape[1])] = self.B @ self.A
        W[:, self.columns] = self.R
        return W

    def whole(self) -> torch.Tensor:
        """A (r, I) with zeros in the kept columns."""
        A = self.A.new_zeros(self.rank, self.A.shape[1] + len(self.columns))
        A[:, others(self.columns, A.shape[1])] = self.A
        return A


def others(columns: torch.Tensor, inputs: int) -> torch.Tensor:
    """The columns (I - s,) that are not in `columns`, ascending."""
    left = torch.ones(inputs, dtype=torch.bool, device=columns.device)
    left[columns] = False
    return left.nonzero().squeeze(1)


def balanced(U: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B (O, r) and A (r, I) with the product U V of an orthonormal U, each column of B as long as A's row (the symmetric split)."""
    length = torch.linalg.vector_norm(V, dim=1)
    root = length.clamp(min=1e-12 * max(float(length.max()) if len(length) else 0.0, 1e-300)).sqrt()
    return U * root, V / root.unsqueeze(1)


class Problem:
    """One linear's weight (O, I) and the moment of its inputs, in fp64; every question about it is answered exactly."""

    def __init__(self, W: torch.Tensor, C: Moment, rows: torch.Tensor | None = None) -> None:
        """`rows` (O,), positive: how much each output's squared error counts, tr(diag(rows) E C Eᵀ)."""
        self.W, self.C = W.to(torch.float64), C
        O, I = self.W.shape
        self._rows = None if rows is None else rows.to(torch.float64).sqrt().unsqueeze(1)
        self._Q: torch.Tensor | None = None
        self.T = self._weighed(self.W)
        if O > I:
            self._Q, self.T = torch.linalg.qr(self.T)
        self.P = C.after(self.T)  # (k, I)
        M = self.P @ self.T.T
        self.M = (M + M.T) / 2
        self.total = float(self.M.diagonal().sum())

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.W.shape[0]), int(self.W.shape[1])

    def left(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """M_I (k, k), what is left for the factors once the columns are free, and P_I C_II⁻¹ (k, s)."""
        if not len(columns):
            return self.M, self.P[:, columns]
        P = self.P[:, columns]
        Y = torch.cholesky_solve(P.T, torch.linalg.cholesky(self.C.inner(columns))).T
        M = self.M - Y @ P.T
        return (M + M.T) / 2, Y

    def tail(self, columns: torch.Tensor) -> torch.Tensor:
        """The least error with these columns at every rank 0 … k (k + 1,), relative to that of an all-zero weight."""
        found = torch.linalg.eigvalsh(self.left(columns)[0]).clamp(min=0)
        return torch.cat([found.new_zeros(1), found.cumsum(0)]).flip(0) / max(self.total, 1e-300)

    def basis(self, columns: torch.Tensor, rank: int) -> torch.Tensor:
        """U (k, r): where the outputs of the best factors lie."""
        M = self.left(columns)[0]
        if rank == 0:
            return M[:, :0]
        return torch.linalg.eigh(M)[1].flip(1)[:, :rank]

    def fit(self, columns: torch.Tensor, rank: int, refit: bool = True) -> Factors:
        """The best factors of rank <= `rank` for sorted columns (s,), and R.

        Without `refit`, LOST's order: the factors of the whole W first, and then the columns of what they leave."""
        O, I = self.shape
        rank = min(rank, len(self.T))
        J = others(columns, I)
        if not len(J):
            empty = self.W.new_zeros
            return Factors(empty(O, 0), empty(0, 0), self.W.clone(), columns, 0.0)
        if not refit:
            return self._sequential(columns, rank, J)
        M, Y = self.left(columns)
        U = torch.linalg.eigh(M)[1].flip(1)[:, :rank] if rank else M[:, :0]
        inside = Y - self.T[:, columns]
        R = self.T[:, columns] + inside - U @ (U.T @ inside)
        lost = float((M.diagonal().sum() - ((M @ U) * U).sum()).clamp(min=0))
        B, A = balanced(U, U.T @ self.T[:, J])
        return Factors(self._turned(B), A, self._turned(R), columns, lost / max(self.total, 1e-300))

    def _sequential(self, columns: torch.Tensor, rank: int, J: torch.Tensor) -> Factors:
        U = self.basis(columns[:0], rank)
        B, A = balanced(U, U.T @ self.T)
        E = self.T - B @ A  # its columns I become zero
        R, A = self.T[:, columns], A[:, J]
        E[:, columns] = 0
        lost = float((self.C.after(E) * E).sum())
        return Factors(self._turned(B), A, self._turned(R), columns, lost / max(self.total, 1e-300))

    def _weighed(self, X: torch.Tensor) -> torch.Tensor:
        return X if self._rows is None else self._rows * X

    def _turned(self, X: torch.Tensor) -> torch.Tensor:
        """The way back from T's rows to the outputs."""
        X = X if self._Q is None else self._Q @ X
        return X if self._rows is None else X / self._rows

    def error(self, W_hat: torch.Tensor) -> float:
        """The objective of any W_hat (O, I), relative to that of an all-zero weight."""
        E = self._weighed(W_hat.to(torch.float64) - self.W)
        return float((self.C.after(E) * E).sum()) / max(self.total, 1e-300)

    # -- which columns -------------------------------------------------------------------------------------------------

    def scores(self, selector: str, U: torch.Tensor) -> torch.Tensor:
        """What each column (I,) is worth on the residual (1 - U Uᵀ) W, by the rule `selector`; dead inputs -1."""
        d = self.C.diagonal
        if selector == "weight":
            found = self.T.square().sum(0) * d
        elif selector == "obs":
            found = (self.P - U @ (U.T @ self.P)).square().sum(0) / d
        else:
            found = (self.T - U @ (U.T @ self.T)).square().sum(0)
            found = found * d if selector == "diag" else found
        return found.masked_fill(self.C.dead, -1.0)

    def choose(self, selector: str, U: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` best columns by a selector, in order of their worth."""
        if selector == "greedy":
            return self._greedy(U, count)
        return self.scores(selector, U).argsort(descending=True, stable=True)[:count]

    def _greedy(self, U: torch.Tensor, count: int) -> torch.Tensor:
        """Columns one by one, each by its exact gain |E C_j|² / C_jj after those before it: a pivoted Cholesky of C, seen by E."""
        E = self.P - U @ (U.T @ self.P)
        gain, d = E.square().sum(0), self.C.diagonal.clone()
        alive = ~self.C.dead
        if self.C.C.dim() == 1:
            return (gain / d).masked_fill(~alive, -1.0).argsort(descending=True, stable=True)[:count]
        least = FLOOR * d
        L, e = E.new_zeros(count, len(d)), E.new_zeros(count, len(E))  # rows of the Cholesky factor, and E seen by them
        found: list[int] = []
        for i in range(count):
            open_ = alive & (d > least)
            worth = torch.where(open_, gain / d.clamp(min=1e-300), alive.to(d.dtype) - 2.0)  # -1: known already, -2: taken
            j = int(worth.argmax())
            found.append(j)
            alive[j] = False
            if not bool(open_[j]):
                continue
            root = d[j].sqrt()
            e[i] = (E[:, j] - L[:i, j] @ e[:i]) / root
            both = torch.stack([L[:i, j], e[:i] @ e[i]]) @ L[:i]
            row, cross = (self.C.C[j] - both[0]) / root, e[i] @ E - both[1]
            gain = (gain - 2 * row * cross + row.square() * e[i].square().sum()).clamp(min=0)
            d = d - row.square()
            L[i] = row
        return torch.tensor(found, dtype=torch.int64, device=d.device)


def for_outputs(W: torch.Tensor, C: Moment, A: torch.Tensor) -> Factors:
    """The best B for given A (r, I): least squares for the outputs of W (O, I); SVD-LLM's update."""
    W = W.to(torch.float64)
    seen = C.after(A)
    H = seen @ A.T
    B = torch.linalg.lstsq((H + H.T) / 2, (W @ seen.T).T).solution.T
    E = B @ A - W
    error = float((C.after(E) * E).sum()) / max(float((C.after(W) * W).sum()), 1e-300)
    scale = (torch.linalg.vector_norm(A, dim=1) / torch.linalg.vector_norm(B, dim=0).clamp(min=1e-300)).sqrt()
    return Factors(B * scale, A / scale.unsqueeze(1), W[:, :0], torch.empty(0, dtype=torch.int64, device=W.device), error)


def search(
    problem: Problem, rank: int, count: int, selectors: tuple[str, ...] = SELECTORS, rounds: int = 4, refit: bool = True
) -> tuple[Factors, str]:
    """The best factors of a rank with `count` columns, and the selector that won.

    Every selector on the residual of the factors alone; then, with the winner, alternately columns by the residual and factors by
    the columns, until the error stops falling.
    """
    empty = torch.empty(0, dtype=torch.int64, device=problem.W.device)
    if count == 0:
        return problem.fit(empty, rank, refit), ""
    if count >= problem.shape[1]:
        return problem.fit(torch.arange(problem.shape[1], device=problem.W.device), 0), ""
    U = problem.basis(empty, rank)
    best, won = None, ""
    for selector in selectors:
        found = problem.fit(problem.choose(selector, U, count).sort().values, rank, refit)
        if best is None or found.error < best.error:
            best, won = found, selector
    assert best is not None
    rule = "diag" if won == "weight" and len(selectors) > 1 else won  # "weight" looks at no residual
    for _ in range(rounds if refit and rule != "weight" else 0):
        columns = problem.choose(rule, problem.basis(best.columns, rank), count).sort().values
        if torch.equal(columns, best.columns):
            break
        found = problem.fit(columns, rank)
        if found.error >= best.error * (1 - 1e-6):
            break
        best = found
    return best, won

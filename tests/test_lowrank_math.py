"""The identities of low-rank + column factorization, in fp64 on small weights, and the budget's choice."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.errors import CompressError
from compress.methods import _budget, _lowrank
from compress.methods._lowrank import Moment, Problem, balanced, moment, others, plain, search

NONE = torch.empty(0, dtype=torch.int64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(inputs: int, seed: int = 1) -> torch.Tensor:
    """Correlated inputs, some of them loud."""
    X = randn(6 * inputs, inputs, seed=seed) @ randn(inputs, inputs, seed=seed + 1) / inputs**0.5
    X[:, ::7] *= 5
    return X.T @ X / len(X)


def weight(O: int, I: int, seed: int = 0) -> torch.Tensor:
    """A weight with a decaying spectrum and a few large columns."""
    U, S, V = torch.linalg.svd(randn(O, I, seed=seed), full_matrices=False)
    W = U @ torch.diag(S * torch.exp(-torch.arange(len(S), dtype=torch.float64) / 8)) @ V
    W[:, 3::11] += 0.3 * randn(O, len(range(3, I, 11)), seed=seed + 5)
    return W


SHAPES = [(24, 40), (40, 24), (32, 32)]
WEIGHTINGS = ["covariance", "diagonal", "none"]


def inputs(weighting: str, I: int, damp: float = 0.0) -> Moment:
    if weighting == "none":
        return plain(I)
    C = covariance(I)
    return moment(C.diagonal().clone() if weighting == "diagonal" else C, damp)


def matrix(C: Moment) -> torch.Tensor:
    return torch.diag(C.C) if C.C.dim() == 1 else C.C


def loss(W: torch.Tensor, W_hat: torch.Tensor, C: Moment) -> float:
    E = W - W_hat
    return float((E @ matrix(C) * E).sum() / (W @ matrix(C) * W).sum())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_and_all_columns_are_exact(shape: tuple[int, int], weighting: str) -> None:
    W, C = weight(*shape), inputs(weighting, shape[1])
    problem = Problem(W, C)
    for columns in (NONE, torch.tensor([0, 5, 9])):
        found = problem.fit(columns, min(shape))
        assert (found.dense() - W).abs().max() < 1e-10
        assert found.error < 1e-12
    for rank in (0, 5):
        found = problem.fit(torch.arange(shape[1]), rank)
        assert torch.equal(found.dense(), W)
        assert found.error == 0
    assert problem.tail(NONE)[0] == pytest.approx(1)
    assert float(problem.tail(NONE)[-1]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_columns_and_weights_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    S = torch.linalg.svdvals(W)
    for rank in (1, 4, 11):
        found = Problem(W, plain(shape[1])).fit(NONE, rank)
        U, _, V = torch.linalg.svd(W, full_matrices=False)
        assert torch.allclose(found.dense(), U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank], atol=1e-10)
        assert found.error == pytest.approx(float(S[rank:].square().sum() / S.square().sum()), rel=1e-8)
        assert torch.allclose(found.B.T @ found.B, torch.diag(S[:rank]), atol=1e-9)
        assert torch.allclose(found.A @ found.A.T, torch.diag(S[:rank]), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_complements_columns_sum_to_the_rest_of_the_spectrum(shape: tuple[int, int]) -> None:
    W, rank = weight(*shape), 5
    problem = Problem(W, plain(shape[1]))
    scores = problem.scores("lost", problem.basis(NONE, rank))
    L = problem.fit(NONE, rank).dense()
    assert torch.allclose(scores, (W - L).square().sum(0), atol=1e-10)
    assert float(scores.sum()) == pytest.approx(float(torch.linalg.svdvals(W)[rank:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_what_it_says_and_refit_beats_columns_after_the_factors_beats_the_factors(
    shape: tuple[int, int], weighting: str
) -> None:
    W, C = weight(*shape), inputs(weighting, shape[1])
    problem, rank, columns = Problem(W, C), 6, torch.tensor([1, 3, 8, 20])
    alone, after, joint = problem.fit(NONE, rank), problem.fit(columns, rank, refit=False), problem.fit(columns, rank)
    for found in (alone, after, joint):
        assert found.error == pytest.approx(loss(W, found.dense(), C), rel=1e-8)
        assert found.error == pytest.approx(problem.error(found.dense()), rel=1e-8)
    assert joint.error <= after.error
    if weighting != "covariance":  # there residual columns alone can hurt what other columns made up for
        assert after.error <= alone.error
    assert joint.error <= alone.error
    assert problem.tail(columns)[rank] == pytest.approx(joint.error, rel=1e-8)
    if weighting == "none":
        E = W - alone.dense()
        assert after.error * problem.total == pytest.approx(float(E.square().sum() - E[:, columns].square().sum()), rel=1e-9)
        J = others(columns, shape[1])
        rest = torch.linalg.svdvals(W[:, J])[rank:].square().sum()
        assert joint.error * problem.total == pytest.approx(float(rest), rel=1e-9)
        assert torch.equal(after.R, W[:, columns]) or shape[0] > shape[1]  # LOST's values are the original's


def test_the_optimum_is_that_of_the_schur_complement() -> None:
    W, C = weight(24, 40), moment(covariance(40))
    I = torch.tensor([2, 7, 11, 30])
    J = others(I, 40)
    M = matrix(C)
    schur = M[J][:, J] - M[J][:, I] @ torch.linalg.solve(M[I][:, I], M[I][:, J])
    Lam = torch.linalg.cholesky(schur)
    U, S, V = torch.linalg.svd(W[:, J] @ Lam, full_matrices=False)
    L = U[:, :6] @ torch.diag(S[:6]) @ V[:6] @ torch.linalg.inv(Lam)
    R = W[:, I] + (W[:, J] - L) @ M[J][:, I] @ torch.linalg.inv(M[I][:, I])
    problem = Problem(W, C)
    found = problem.fit(I, 6)
    assert found.error * problem.total == pytest.approx(float(S[6:].square().sum()), rel=1e-4)
    assert torch.allclose(found.B @ found.A, L, atol=1e-8)
    assert torch.allclose(found.R, R, atol=1e-8)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):  # nothing near it is better
        B, A, R = (t + 1e-3 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (found.B, found.A, found.R))
        assert problem.error(_lowrank.Factors(B, A, R, I, 0.0).dense()) > found.error


def test_the_gain_of_one_column_is_exact() -> None:
    W, C = weight(24, 40), moment(covariance(40))
    problem = Problem(W, C)
    U = problem.basis(NONE, 5)
    E = W - U @ (U.T @ W)
    for j in (0, 7, 33):
        e = matrix(C)[:, j]
        better = E.clone()
        better[:, j] -= E @ e / e[j]
        gain = float((E @ matrix(C) * E).sum() - (better @ matrix(C) * better).sum())
        assert float(problem.scores("obs", U)[j]) == pytest.approx(gain, rel=1e-9)


def test_greedy_takes_the_best_next_column_every_time() -> None:
    W, C = weight(20, 28), moment(covariance(28))
    problem = Problem(W, C)
    U = problem.basis(NONE, 4)
    P, M = problem.P - U @ (U.T @ problem.P), matrix(C)
    taken: list[int] = []
    for _ in range(8):
        gains = {}
        for j in set(range(28)) - set(taken):
            I = torch.tensor([*taken, j])
            gains[j] = float((torch.linalg.solve(M[I][:, I], P[:, I].T) * P[:, I].T).sum())
        taken.append(max(gains, key=lambda j: gains[j]))
    assert problem.choose("greedy", U, 8).tolist() == taken


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_more_rank_and_more_columns_never_hurt(shape: tuple[int, int], weighting: str) -> None:
    problem = Problem(weight(*shape), inputs(weighting, shape[1]))
    order = problem.choose("weight", problem.basis(NONE, 4), 20)
    tails = torch.stack([problem.tail(order[:s].sort().values) for s in range(0, 21, 4)])
    assert (tails.diff(dim=0) <= 1e-12).all()
    assert (tails.diff(dim=1) <= 1e-12).all()


def test_whitening_keeps_the_spectrum_and_every_square_root_gives_the_same_factors() -> None:
    W, C = weight(24, 40), covariance(40)
    problem = Problem(W, moment(C))
    root = torch.linalg.cholesky(matrix(problem.C))
    values, vectors = torch.linalg.eigh(matrix(problem.C))
    other = vectors @ torch.diag(values.sqrt())
    for S in (root, other):
        U, s, V = torch.linalg.svd(W @ S, full_matrices=False)
        L = U[:, :6] @ torch.diag(s[:6]) @ V[:6] @ torch.linalg.inv(S)
        assert torch.allclose(problem.fit(NONE, 6).dense(), L, atol=1e-8)
        assert problem.fit(NONE, 6).error * problem.total == pytest.approx(float(s[6:].square().sum()), rel=1e-8)


def test_special_weightings_are_special_cases() -> None:
    W, d = weight(24, 40), torch.rand(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.1
    scaled, full = Problem(W, moment(d)), Problem(W, moment(torch.diag(d)))
    U, s, V = torch.linalg.svd(W * d.sqrt(), full_matrices=False)
    L = U[:, :6] @ torch.diag(s[:6]) @ V[:6] / d.sqrt()
    for problem in (scaled, full):
        assert torch.allclose(problem.fit(NONE, 6).dense(), L, atol=1e-9)
    columns = torch.tensor([4, 9])
    assert torch.allclose(scaled.fit(columns, 6).dense(), full.fit(columns, 6).dense(), atol=1e-9)
    one, eye = Problem(W, plain(40)), Problem(W, moment(3.0 * torch.eye(40, dtype=torch.float64)))
    for selector in _lowrank.SELECTORS:
        chosen = [search(p, 6, 5, (selector,), 0)[0] for p in (one, eye)]
        assert torch.equal(chosen[0].columns, chosen[1].columns), selector
    C = covariance(40)
    a, b = (Problem(W, moment(C * f)).fit(columns, 6) for f in (1.0, 1e6))
    assert torch.allclose(a.A, b.A, atol=1e-9)
    assert torch.allclose(a.B, b.B, atol=1e-9)


@pytest.mark.parametrize("selector", [*_lowrank.SELECTORS, "auto"])
def test_permuting_the_inputs_permutes_the_columns_and_changes_no_output(selector: str) -> None:
    W, C = weight(24, 40), covariance(40)
    at = torch.randperm(40, generator=torch.Generator().manual_seed(6))
    rules = _lowrank.SELECTORS if selector == "auto" else (selector,)
    plain_, moved = (search(Problem(w, moment(c)), 5, 6, rules)[0] for w, c in ((W, C), (W[:, at], C[at][:, at])))
    assert set(at[moved.columns].tolist()) == set(plain_.columns.tolist())
    assert torch.allclose(moved.dense(), plain_.dense()[:, at], atol=1e-8)


def test_alternation_never_ends_worse_and_all_selectors_are_at_least_as_good_as_one() -> None:
    for seed in range(4):
        problem = Problem(weight(30, 44, seed), moment(covariance(44, seed + 10)))
        start = search(problem, 6, 7, rounds=0)[0].error
        assert search(problem, 6, 7)[0].error <= start
        for selector in _lowrank.SELECTORS:
            one = search(problem, 6, 7, (selector,), 0)[0].error
            assert start <= one * (1 + 1e-12)
            assert search(problem, 6, 7, (selector,))[0].error <= one * (1 + 1e-12)
        free = Problem(weight(30, 44, seed), plain(44))  # the concentration step of trimmed principal components
        before = search(free, 6, 7, ("lost",), 0)[0].error
        assert search(free, 6, 7, ("lost",))[0].error <= before


def test_the_specifications_table_in_miniature() -> None:
    """Correlated inputs with six loud columns: weighting and the joint refit matter, unweighted columns lose to plain rank."""
    X = randn(2000, 128, seed=1) @ (torch.eye(128, dtype=torch.float64) + 0.2 * randn(128, 128, seed=2))
    X[:, [3, 17, 40, 77, 99, 120]] *= 12
    W, C = randn(96, 128, seed=3), moment(X.T @ X)
    problem, rank, s = Problem(W, C), 16, 8
    svd = problem.error(Problem(W, plain(128)).fit(NONE, rank).dense())
    scaled = problem.error(Problem(W, moment(C.diagonal.clone())).fit(NONE, rank).dense())
    alone = problem.fit(NONE, rank).error
    lost, best = search(problem, rank, s, ("lost",), 0, refit=False)[0].error, search(problem, rank, s)[0].error
    assert svd > scaled > alone > best
    assert lost > best
    assert best < problem.fit(NONE, _budget.rank_of(_budget.cost_of(rank, s, (96, 128)), 0, (96, 128))).error


def test_dead_inputs_are_never_chosen_and_a_singular_moment_is_damped_aloud() -> None:
    C = covariance(40)
    C[:, 5] = C[5] = 0
    found = moment(C, 0.01)
    assert found.dead.tolist() == [j == 5 for j in range(40)]
    problem = Problem(weight(24, 40), found)
    for selector in _lowrank.SELECTORS:
        assert 5 not in problem.choose(selector, problem.basis(NONE, 3), 39).tolist(), selector
    X = randn(10, 40)
    low = moment(X.T @ X)
    assert 0 < low.damp < 1e-3
    assert not int(torch.linalg.cholesky_ex(low.C)[1])
    assert torch.isfinite(search(Problem(weight(24, 40), low), 6, 8)[0].dense()).all()
    with pytest.raises(CompressError, match="its inputs are 0"):
        moment(torch.zeros(4, 4), name="x")
    with pytest.raises(CompressError, match="stays indefinite"):
        moment(-covariance(8) + 2 * torch.diag(covariance(8).diagonal()) - 9 * torch.ones(8, 8), name="x")


def test_factors_of_a_rank_deficient_weight_are_finite() -> None:
    B, A = balanced(torch.eye(4, 3, dtype=torch.float64), torch.diag(torch.tensor([2.0, 1e-9, 0.0], dtype=torch.float64)))
    assert torch.isfinite(torch.cat([B.flatten(), A.flatten()])).all()
    assert torch.allclose(B @ A, torch.diag(torch.tensor([2.0, 1e-9, 0.0, 0.0], dtype=torch.float64))[:, :3], atol=1e-15)
    W = randn(12, 3) @ randn(3, 16, seed=1)
    found = Problem(W, plain(16)).fit(NONE, 8)
    assert torch.allclose(found.dense(), W, atol=1e-10)


def test_a_gamma_folds_into_the_factors() -> None:
    """γ B(A x) + (1 - γ) W_s x_I is [γ B | (1 - γ) W_s] [A x ; x_I]; γ = 1 leaves the factors, γ = 0 the columns."""
    B, A, W_s, I, x = randn(24, 5), randn(5, 40, seed=1), randn(24, 6, seed=2), torch.arange(0, 36, 6), randn(7, 40, seed=3)
    z = torch.cat([x @ A.T, x[:, I]], 1)
    for gamma in (0.0, 0.7, 1.0):
        want = gamma * (x @ A.T) @ B.T + (1 - gamma) * x[:, I] @ W_s.T
        fused = torch.cat([gamma * B, (1 - gamma) * W_s], 1)
        assert torch.allclose(z @ fused.T, want, rtol=1e-6)
        J = others(I, 40)
        low = _lowrank.Factors(gamma * B, A[:, J], (1 - gamma) * W_s + gamma * B @ A[:, I], I, 0.0)
        assert torch.allclose(x @ low.dense().T, want, rtol=1e-6)


def test_intermediate_neurons_may_be_reordered() -> None:
    """down_proj: with the kept channels first (and gate's and up's rows alike) the block's output does not change."""
    gate, up, down, x = weight(40, 24), weight(40, 24, 1), weight(24, 40, 2), randn(9, 24, seed=3)
    found = search(Problem(down, moment(covariance(40))), 5, 6)[0]
    at = torch.cat([found.columns, others(found.columns, 40)])
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    moved = torch.nn.functional.silu(x @ gate[at].T) * (x @ up[at].T)
    y = hidden @ found.dense().T
    s = len(found.columns)
    assert torch.allclose(moved[:, s:] @ found.A.T @ found.B.T + moved[:, :s] @ found.R.T, y, atol=1e-10)


def test_the_update_is_the_least_squares_solution_for_given_inputs() -> None:
    W, dense, C = weight(24, 40), covariance(40), moment(covariance(40, 8))
    A = Problem(W, moment(dense)).fit(NONE, 6).A
    found = _lowrank.for_outputs(W, C, A)
    root = torch.linalg.cholesky(C.C)
    B = torch.linalg.lstsq((A @ root).T, (W @ root).T).solution.T
    assert torch.allclose(found.dense(), B @ A, atol=1e-8)
    assert found.error == pytest.approx(loss(W, B @ A, C), rel=1e-8)
    assert Problem(W, C).fit(NONE, 6).error <= found.error <= loss(W, Problem(W, moment(dense)).fit(NONE, 6).dense(), C)


# -- the budget ------------------------------------------------------------------------------------------------------------


def made(shape: tuple[int, int], seed: int, weight_: float = 1.0) -> _budget.Options:
    problem = Problem(weight(*shape, seed), moment(covariance(shape[1], seed + 20)))
    columns = [0, 4, 8, 16]
    U = problem.basis(NONE, 6)
    tails = torch.stack([problem.tail(problem.choose("weight", U, s).sort().values) for s in columns])
    return _budget.options(tails, columns, shape, weight_, 4)


def test_options_rise_in_cost_and_fall_in_error_and_end_with_the_whole_weight() -> None:
    o = made((24, 40), 0)
    assert o.cost == sorted(o.cost)
    assert o.error == sorted(o.error, reverse=True)
    assert (o.cost[-1], o.error[-1], o.rank[-1], o.columns[-1]) == (960, 0.0, 0, 40)
    for cost, rank, columns in zip(o.cost, o.rank, o.columns, strict=True):
        assert cost == _budget.cost_of(rank, columns, (24, 40))
        assert rank or columns


def test_the_choice_is_close_to_the_best_of_all() -> None:
    linears = [made((24, 40), 0), made((32, 32), 1, 3.0), made((40, 24), 2, 0.2)]
    for budget in (900, 1500, 2300, 2944):
        picked = _budget.allocate(linears, budget)
        assert picked is not None
        spent = sum(o.cost[k] for o, k in zip(linears, picked, strict=True))
        assert spent <= budget
        error = sum(o.error[k] for o, k in zip(linears, picked, strict=True))
        best = min(
            sum(o.error[k] for o, k in zip(linears, row, strict=True))
            for row in itertools.product(*(range(len(o.cost)) for o in linears))
            if sum(o.cost[k] for o, k in zip(linears, row, strict=True)) <= budget
        )
        assert error <= best * 1.1 + 1e-12, budget
        for i, (o, k) in enumerate(zip(linears, picked, strict=True)):  # no single step that fits is left
            assert not any(spent - o.cost[k] + o.cost[j] <= budget for j in range(k + 1, len(o.cost))), i
    assert _budget.allocate(linears, 10) is None


@pytest.mark.parametrize("compact", [True, False])
def test_ranks_of_a_budget(compact: bool) -> None:
    for shape in ((24, 40), (64, 16)):
        for columns in (0, 3, shape[1]):
            for budget in (0, 500, shape[0] * shape[1]):
                rank = _budget.rank_of(budget, columns, shape, 1, compact)
                if rank < 0:
                    assert columns * shape[0] > budget
                elif columns < shape[1]:
                    assert _budget.cost_of(rank, columns, shape, compact) <= budget
                    assert rank == min(shape) or _budget.cost_of(rank + 1, columns, shape, compact) > budget
    assert _budget.rank_of(4096 * 4096 // 2, 204, (4096, 4096), 1, False) == 922  # the specification's figures

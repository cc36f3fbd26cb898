"""ARMOR's mathematics: the identities of its steps, its guarantees, and the official code's numbers."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import EXAMPLE, ROOT
from safetensors.torch import load_file

from compress.methods import _armor, _armor_fast, _armor_quality
from compress.methods._armor import Factors, left, loss, relative_loss, right, start
from compress.methods._armor_fast import Frame, Plan, State, fold, rows, solve_A, solve_B, sweep, unfold, value
from compress.methods._masks import normalise
from compress.methods._solvers import Factor, factorize
from compress.methods._sparse_solver import sparsify

O, I, BO, BI = 24, 36, 8, 12
N0, N1 = O // BO, I // BI
SMALL = Plan(rounds=2, restarts=2, steps=12, last=12, every=4)
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def problem() -> Problem:
    """W (24, 36), h (36,) and C (36, 36) with diagonal h, fp64."""
    X = _random(200, I, seed=1) @ _random(I, I, seed=2) * (0.3 + _random(I, seed=3).abs())
    C = X.T @ X / 200
    return _random(O, I), C.diagonal().clone(), C


@pytest.fixture
def factors(problem: Problem) -> Factors:
    """Some A, B and core, far from any optimum."""
    W, h, _ = problem
    f = start(W, h, BO, BI, 2, 4)
    return Factors(f.A + 0.3 * _random(N0, BO, BO, seed=4), f.B + 0.3 * _random(N1, BI, BI, seed=5), f.S, f.mask)


def _folded(f: Factors, W: torch.Tensor, h: torch.Tensor) -> tuple[State, torch.Tensor]:
    """The unweighted problem of the fast mode."""
    root = h.sqrt()
    s = State(f.A.clone(), f.B * root.view(-1, 1, BI), fold(f.S, BI).clone(), fold(f.mask, BI).clone())
    return s, fold(W * root, BI)


def _half_gradient(f: Factors, W: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return right(left(f.A.transpose(1, 2), (_armor.reconstruct(f) - W) * h), f.B.transpose(1, 2))


def _solve(f: Factors, W: torch.Tensor, h: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> tuple[Factors, torch.Tensor]:
    """The factors after an exact step on these groups, and what `core_step` says of the loss."""
    s, kept, cost = _armor.core_step(f, _half_gradient(f, W, h), f.B * h.sqrt().view(-1, 1, BI), row, column, 2, 4)
    return _put(f, row, column, s, kept), cost


def _put(f: Factors, row: torch.Tensor, column: torch.Tensor, s: torch.Tensor | float, kept: torch.Tensor | bool) -> Factors:
    S, mask = f.S.clone(), f.mask.clone()
    where = row.unsqueeze(1), column.unsqueeze(1) + torch.arange(4)
    S[where], mask[where] = s, kept
    return Factors(f.A, f.B, S, mask)


def _one_per_block(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    j, k = torch.tensor(list(itertools.product(range(N0), range(N1)))).T
    return j * BO + torch.randint(BO, (N0 * N1,), generator=g), k * BI + 4 * torch.randint(BI // 4, (N0 * N1,), generator=g)


def test_block_sizes_are_divisors() -> None:
    sizes = [_armor.block_size(d) for d in (576, 4096, 11008, 288, 300, 14, 7)]
    assert sizes == [96, 128, 128, 96, 100, 0, 0]
    assert _armor.block_size(576, 64) == 64
    assert _armor.block_size(96, 128, 32) == 96


def test_a_size_that_divides_badly_gives_way_to_one_that_does_not_divide() -> None:
    assert [_armor.any_size(d) for d in (576, 4096, 300, 131, 2 * 67)] == [96, 128, 100, 128, 128]
    assert [_armor.any_size(d, 64, 1) for d in (131, 67, 40)] == [64, 64, 40]
    assert _armor.any_size(576, 128, 4, ragged=True) == 128
    assert _armor.any_size(30, 22, 4, ragged=True) == 20


@pytest.mark.parametrize("mode", ["fast", "paper", "quality"])
def test_padding_stays_empty_and_apart(problem: Problem, mode: str) -> None:
    """Blocks that reach beyond O and I: what lies there is exactly the identity's and zeros, whatever the optimiser does."""
    from compress.methods import _armor_quality

    W, h, C = problem
    W, h, C = W[: O - 3].float(), h.float(), C.float()
    W, h, C = W[:, : I - 4].contiguous(), h[: I - 4], C[: I - 4, : I - 4]
    bar = normalise(W).W
    target = _armor.padded(bar, BO, BI)
    assert target.shape == (O, I)
    energy = torch.nn.functional.pad(h, (0, 4), value=float(h.mean()))
    if mode == "quality":
        wide = _armor_quality.padded(_armor_quality.damped(C, 0.01), BI)
        small = _armor_fast.Plan(rounds=1, restarts=2, steps=4, last=8)
        f, _ = _armor_quality.quality(target, wide, BO, BI, damp=0.0, begin=small, plan=small)
    elif mode == "paper":
        f, _ = _armor.paper(target, energy, BO, BI, iters=40, lr=1e-2)
    else:
        f, _ = _armor_fast.fast(target, energy, BO, BI, 2, 4, _armor_fast.Plan(restarts=3, last=20))
    assert not f.S[O - 3 :].any()
    assert not f.S[:, I - 4 :].any()
    for last, more in ((f.A[-1], 3), (f.B[-1], 4)):
        b = len(last)
        assert not last[: b - more, b - more :].any()
        assert not last[b - more :, : b - more].any()
    whole = _armor.reconstruct(f)
    assert not whole[O - 3 :].any()
    assert _armor.relative_loss(f, target, energy) < 0.9 * _armor.relative_loss(start(target, energy, BO, BI, 2, 4), target, energy)


def test_the_start_is_nowag_p(problem: Problem) -> None:
    W, h, _ = problem
    f = start(W, h, BO, BI, 2, 4)
    score = (W.square() * h).view(O, -1, 4)
    pruned = score.sort(dim=2).values[..., :2].sum()
    assert loss(f, W, h) == pytest.approx(float(pruned), rel=1e-12)
    assert relative_loss(f, W, h) == pytest.approx(float(pruned / score.sum()), rel=1e-12)
    assert torch.equal(f.S[f.mask], W[f.mask])


def test_the_sparse_step_changes_nothing_at_the_start(problem: Problem) -> None:
    W, h, _ = problem
    f = start(W, h, BO, BI, 2, 4)
    for seed in range(4):
        new, _ = _solve(f, W, h, *_one_per_block(seed))
        assert torch.equal(new.mask, f.mask)
        assert torch.allclose(new.S, f.S, atol=1e-6)  # the paper's two ridges are absolute
    s, V = _folded(f, W, h)
    sweep(s, V, None, 2, 4)
    assert torch.equal(unfold(s.mask), f.mask)
    assert torch.allclose(unfold(s.S), f.S, atol=1e-5)


def test_a_sparse_step_lowers_the_loss_by_what_it_says(problem: Problem, factors: Factors) -> None:
    W, h, _ = problem
    row, column = _one_per_block()
    new, cost = _solve(factors, W, h, row, column)
    empty = _put(factors, row, column, 0.0, False)
    assert loss(new, W, h) < loss(factors, W, h)
    assert loss(new, W, h) == pytest.approx(loss(empty, W, h) + float(cost.sum()), rel=1e-7)  # the ridges again
    assert (new.mask.view(O, -1, 4).sum(2) == 2).all()


def test_the_best_support_is_the_best_of_all_least_squares(problem: Problem, factors: Factors) -> None:
    W, h, _ = problem
    row, column = _one_per_block(3)
    new, _ = _solve(factors, W, h, row, column)
    r, c = int(row[4]), int(column[4])
    j, k = r // BO, c // BI
    block = slice(j * BO, (j + 1) * BO), slice(k * BI, (k + 1) * BI)
    root = h[block[1]].sqrt()
    empty = _put(factors, row[4:5], column[4:5], 0.0, False)
    R = ((_armor.reconstruct(empty) - W)[block] * root).reshape(-1)
    losses = {}
    for P in itertools.combinations(range(4), 2):
        X = torch.stack([torch.outer(factors.A[j, :, r % BO], factors.B[k, c % BI + p] * root).reshape(-1) for p in P], 1)
        s = torch.linalg.lstsq(X, -R.unsqueeze(1)).solution[:, 0]
        losses[float((R + X @ s).square().sum())] = (P, s)
    P, s = losses[min(losses)]
    assert new.mask[r, c : c + 4].nonzero().squeeze(1).tolist() == list(P)
    assert torch.allclose(new.S[r, [c + p for p in P]], s, rtol=1e-6)


def test_many_blocks_at_once_are_one_at_a_time(problem: Problem, factors: Factors) -> None:
    W, h, _ = problem
    row, column = _one_per_block(1)
    together, _ = _solve(factors, W, h, row, column)
    one = factors
    for i in range(len(row)):
        one, _ = _solve(one, W, h, row[i : i + 1], column[i : i + 1])
    assert torch.equal(together.mask, one.mask)
    assert torch.allclose(together.S, one.S, atol=1e-10)


def test_the_gram_form_is_the_direct_form(problem: Problem, factors: Factors) -> None:
    W, h, _ = problem
    (row, column), root = _one_per_block(2), h.sqrt()
    G, empty = _half_gradient(factors, W, h), _put(factors, *_one_per_block(2), 0.0, False)
    E = (_armor.reconstruct(empty) - W) * root
    for r, c in zip(row.tolist(), column.tolist(), strict=True):
        j, k = r // BO, c // BI
        a = factors.A[j, :, r % BO]
        B = factors.B[k, c % BI : c % BI + 4] * root[k * BI : (k + 1) * BI]
        direct = B @ E[j * BO : (j + 1) * BO, k * BI : (k + 1) * BI].T @ a
        assert torch.allclose(G[r, c : c + 4] - a @ a * (factors.S[r, c : c + 4] @ (B @ B.T)), direct, atol=1e-10)


def test_diagonal_wrappers_gain_nothing(problem: Problem) -> None:
    W, h, _ = problem
    f = start(W, h, BO, BI, 2, 4)
    A, B = (torch.diag_embed(_random(*x.shape[:2], seed=i).abs() + 0.2) for i, x in enumerate((f.A, f.B)))
    s, V = _folded(Factors(A, B, torch.zeros_like(f.S), f.mask), W, h)
    sweep(s, V, None, 2, 4)
    assert value(s, V) == pytest.approx(loss(f, W, h), rel=1e-6)


def test_wrappers_never_raise_the_loss_and_B_ignores_h(problem: Problem, factors: Factors) -> None:
    W, h, _ = problem
    s, V = _folded(factors, W, h)
    before = value(s, V)
    s.A = solve_A(s, V)
    middle = value(s, V)
    B = solve_B(s, V)
    assert value(State(s.A, B, s.S, s.mask), V) < middle < before
    other, U = _folded(Factors(s.A, factors.B, factors.S, factors.mask), W, torch.ones_like(h))
    assert torch.allclose(solve_B(other, U) * h.sqrt().view(-1, 1, BI), B, rtol=1e-5)


def test_the_fold_is_undone(problem: Problem) -> None:
    W = problem[0]
    A = _random(N0, BO, BO)
    assert torch.equal(unfold(fold(W, BI)), W)
    assert torch.allclose(unfold(rows(A, fold(W, BI))), left(A, W))
    assert torch.allclose(left(A, W), torch.block_diag(*A) @ W)


@pytest.mark.parametrize("full", [False, True])
def test_the_fast_mode_s_moves_never_raise_the_loss(problem: Problem, factors: Factors, full: bool) -> None:
    W, h, C = problem
    s, V = _folded(factors, W, h)
    white = None
    if full:
        K, _, white = _armor_quality.whiten(C, BI)
        s.B, V = factors.B @ K, fold(right(W, K), BI)
    last = value(s, V, white)
    for _ in range(6):
        s.A = solve_A(s, V, white)
        losses = [value(s, V, white)]
        s.B = solve_B(s, V, white)
        losses.append(value(s, V, white))
        sweep(s, V, white, 2, 4)
        losses.append(value(s, V, white))
        s = _armor_fast.descend(s, V, white, 2, 4, 5, SMALL)
        losses.append(value(s, V, white))
        for now in losses:
            assert now <= last * (1 + 1e-12)
            last = now
        assert (unfold(s.mask).view(O, -1, 4).sum(2) == 2).all()
        assert not s.S[~s.mask].any()


@pytest.mark.parametrize("full", [False, True])
def test_a_column_group_changes_the_loss_as_it_was_tested(problem: Problem, factors: Factors, full: bool) -> None:
    W, h, C = problem
    s, V = _folded(factors, W, h)
    white = torch.eye(I, dtype=W.dtype)
    if full:
        K, _, white = _armor_quality.whiten(C, BI)
        s.B, V = factors.B @ K, fold(right(W, K), BI)
    E = rows(s.A, s.S @ s.B) - V
    G = rows(s.A.transpose(1, 2), _armor_fast.weigh(E, white)) @ s.B.transpose(1, 2)
    k, c, P = 1, slice(4, 8), s.A.transpose(1, 2) @ s.A
    Q = (s.B[k, c] @ s.B[k, c].T).expand(N0, 4, 4)
    inverses = _armor.support_inverses(Q, 2, 1e-12)
    Gc, Sc = G[k].view(N0, BO, BI)[:, :, c], s.S[k].view(N0, BO, BI)[:, :, c]
    d, Pd, which = _armor_fast.group_step(Gc, Sc, P, Q, inverses)
    assert torch.allclose(Pd, P @ d)
    change = float((2 * Gc * d + Pd * (d @ Q)).sum())
    before = value(s, V, white)
    s.S[k].view(N0, BO, BI)[:, :, c] += d
    assert (which >= 0).any()
    assert change < 0
    assert value(s, V, white) - before == pytest.approx(change, rel=1e-9)


def test_rows_that_raise_the_loss_together_are_solved_in_parts() -> None:
    """Rows that are nearly copies of each other each take the whole step: all together they overshoot, two do not."""
    A = torch.ones(1, 8, 8, dtype=torch.float64) + 0.05 * _random(1, 8, 8)
    P, Q = A.transpose(1, 2) @ A, torch.eye(4, dtype=torch.float64).unsqueeze(0)
    g, s, inverses = A.transpose(1, 2) @ _random(1, 8, 4), torch.zeros(1, 8, 4, dtype=torch.float64), _armor.support_inverses(Q, 2)
    p = P.diagonal(dim1=1, dim2=2).unsqueeze(2)
    d, _, which, bad = _armor_fast._solved(g, s, P, p, Q, inverses)
    assert bad.tolist() == [0]
    assert not d.any()
    assert (which == -1).all()
    d, Pd, which = _armor_fast.group_step(g, s, P, Q, inverses)
    assert float((2 * g * d + Pd * (d @ Q)).sum()) < 0
    assert (which >= 0).any()


def test_the_gradient_in_a_frame_is_the_gradient(problem: Problem, factors: Factors) -> None:
    W, _, C = problem
    K, _, white = _armor_quality.whiten(C, BI)
    s, V = State(factors.A, factors.B @ K, fold(factors.S, BI), fold(factors.mask, BI)), fold(right(W, K), BI)
    frame = Frame.at(s, white)
    x = frame.to(s)
    assert torch.allclose(frame.back(x, s.mask).A, s.A)
    f, g = frame.gradient(x, s.mask, V, white)
    d = _random(len(x), seed=7)
    d[-s.mask.numel() :] *= s.mask.view(-1)
    step = 1e-6
    up, down = (frame.gradient(x + t * d, s.mask, V, white)[0] for t in (step, -step))
    assert f == pytest.approx(value(s, V, white) / 2)
    assert (up - down) / (2 * step) == pytest.approx(float(g @ d), rel=1e-6)


def test_l_bfgs_knows_the_last_step() -> None:
    c = _armor.Curvature(3)
    for i in range(5):
        s = _random(20, seed=i)
        y = s * torch.linspace(0.1, 3.0, 20, dtype=torch.float64)
        c.learn(s, y)
    assert len(c.pairs) == 3
    assert torch.allclose(c.direction(y), s)
    c.learn(s, -y)  # no curvature in that
    assert len(c.pairs) == 3


def test_a_restart_prunes_the_core_that_loses_nothing(problem: Problem, factors: Factors) -> None:
    W, h, C = problem
    s, V = _folded(factors, W, h)
    T = _armor_fast.dense_core(s, V)
    assert value(State(s.A, s.B, T, s.mask), V) < 1e-8 * float(V.square().sum())
    Q = s.B @ s.B.transpose(1, 2)
    S, mask = _armor_fast.compensate(T, Q, 2, 4)
    for k in range(N1):
        pruned = sparsify(T[k].float(), _factor(Q[k]), nm=(2, 4))
        assert torch.equal(pruned.mask, mask[k])
        assert torch.allclose(pruned.W, S[k].float(), atol=1e-4)
    assert torch.equal(_armor_fast.restart(s, V, None, 2, 4, False).mask, mask)
    eye = torch.eye(I, dtype=W.dtype)
    for backwards in (False, True):
        one, other = (_armor_fast.restart(s, V, c, 2, 4, backwards) for c in (None, eye))
        assert torch.equal(one.mask, other.mask)
        assert torch.allclose(one.S, other.S, rtol=1e-2, atol=2e-3)  # the ridges differ, and T is far from small
        assert (_armor_fast.restart(s, V, C, 2, 4, backwards).mask.view(N1, O, -1, 4).sum(3) == 2).all()


def _factor(Q: torch.Tensor) -> Factor:
    return factorize(Q.float().clone(), 0.0)


@pytest.mark.parametrize("lr", [1e-3, 3.0])
def test_the_best_iterate_is_at_most_the_start(problem: Problem, lr: float) -> None:
    """Even where Adam blows up."""
    W, h, _ = problem
    f, trace = _armor.paper(W, h, BO, BI, iters=40, lr=lr)
    assert trace["L0"] == pytest.approx(relative_loss(start(W, h, BO, BI, 2, 4), W, h))
    assert trace["L_best"] <= trace["L0"]
    assert relative_loss(f, W, h) == pytest.approx(trace["L_best"])
    assert (f.mask.view(O, -1, 4).sum(2) == 2).all()
    assert not f.S[~f.mask].any()
    assert (trace["L_best"] < 0.7 * trace["L0"]) == (lr < 1)


def test_the_paper_s_mode_stops_early(problem: Problem) -> None:
    W, h, _ = problem
    _, trace = _armor.paper(W, h, BO, BI, iters=1000, lr=0.0)
    assert len(trace["losses"]) < 1000


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 6)])
def test_the_fast_mode_keeps_its_promises(problem: Problem, pattern: tuple[int, int]) -> None:
    W, h, _ = problem
    n, m = pattern
    f, trace = _armor_fast.fast(W, h, BO, BI, n, m, SMALL)
    assert trace["L_best"] < 0.5 * trace["L0"]
    assert relative_loss(f, W, h) == pytest.approx(trace["L_best"])
    assert (f.mask.view(O, -1, m).sum(2) == n).all()
    assert not f.S[~f.mask].any()
    paper = _armor.paper(W, h, BO, BI, n, m, iters=200, lr=1e-3)[1]["L_best"]
    assert trace["L_best"] < paper


def test_the_full_covariance_of_independent_inputs_is_the_diagonal_problem(problem: Problem, factors: Factors) -> None:
    W, h, _ = problem
    assert _armor_quality.full_loss(factors, W, torch.diag(h)) == pytest.approx(loss(factors, W, h))
    s, V = _folded(factors, W, h)
    eye = torch.eye(I, dtype=W.dtype)
    assert value(s, V, eye) == pytest.approx(value(s, V))
    assert torch.allclose(solve_A(s, V, eye), solve_A(s, V))
    assert torch.allclose(solve_B(s, V, eye), solve_B(s, V))
    t = State(s.A, s.B, s.S.clone(), s.mask.clone())
    sweep(s, V, None, 2, 4)
    sweep(t, V, eye, 2, 4)
    assert torch.equal(s.mask, t.mask)
    assert torch.allclose(s.S, t.S)


def test_whitening_keeps_the_loss(problem: Problem, factors: Factors) -> None:
    W, _, C = problem
    K, inverse, white = _armor_quality.whiten(C, BI)
    s = State(factors.A, factors.B @ K, fold(factors.S, BI), fold(factors.mask, BI))
    assert value(s, fold(right(W, K), BI), white) == pytest.approx(_armor_quality.full_loss(factors, W, C))
    assert torch.allclose(K @ inverse, torch.eye(BI, dtype=W.dtype).expand_as(K), atol=1e-8)
    assert torch.allclose(white[BI : 2 * BI, BI : 2 * BI], torch.eye(BI, dtype=W.dtype), atol=1e-8)


def test_the_wrappers_are_exact_under_the_full_covariance(problem: Problem, factors: Factors) -> None:
    """A as in the closed form, and B_k where the gradient vanishes."""
    W, _, C = problem
    K, _, white = _armor_quality.whiten(C, BI)
    s, V = State(factors.A, factors.B @ K, fold(factors.S, BI), fold(factors.mask, BI)), fold(right(W, K), BI)
    Z, plain = right(factors.S, factors.B), slice(BO, 2 * BO)
    closed = W[plain] @ C @ Z[plain].T @ torch.linalg.inv(Z[plain] @ C @ Z[plain].T)
    assert torch.allclose(solve_A(s, V, white)[1], closed, rtol=1e-4, atol=1e-5)
    s.B = solve_B(s, V, white)
    E = _armor_fast.weigh(rows(s.A, s.S @ s.B) - V, white)
    gradient = rows(s.A, s.S).transpose(1, 2) @ E
    assert float(gradient[-1].abs().max()) < 1e-5 * float(gradient[0].abs().max())  # the last B_k has not been disturbed since


def test_the_quality_mode_is_at_most_its_starts(problem: Problem) -> None:
    W, _, C = problem
    f, trace = _armor_quality.quality(W, C, BO, BI, begin=replace(SMALL, restarts=0), plan=SMALL)
    assert trace["L_best"] < min(trace["L_fast"], trace["L_sparsegpt"], trace["L0"])
    damped = _armor_quality.damped(C, 0.01)
    total = float((W @ damped * W).sum())
    assert _armor_quality.full_loss(f, W, damped) / total == pytest.approx(trace["L_best"])
    assert (f.mask.view(O, -1, 4).sum(2) == 2).all()
    assert not f.S[~f.mask].any()


def test_two_runs_give_the_same_bits(problem: Problem) -> None:
    W, h, C = (x.float() for x in problem)
    runs = [
        (_armor.paper(W, h, BO, BI, iters=30, lr=1e-3, seed=3)[0], _armor_fast.fast(W, h, BO, BI, plan=SMALL)[0],
         _armor_quality.quality(W, C, BO, BI, begin=SMALL, plan=SMALL)[0]) for _ in range(2)
    ]  # fmt: skip
    for f, g in zip(*runs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip((f.A, f.B, f.S, f.mask), (g.A, g.B, g.S, g.mask), strict=True))
    other = _armor.paper(W, h, BO, BI, iters=30, lr=1e-3, seed=4)[0]
    assert not torch.equal(other.S, runs[0][0].S)


def test_zeros_are_solved_without_a_nan() -> None:
    W = torch.zeros(O, I)
    h, C = torch.ones(I), torch.eye(I)
    h[3] = 0.0
    for f in (_armor_fast.fast(W, h, BO, BI, plan=SMALL)[0], _armor_quality.quality(W, C, BO, BI, begin=SMALL, plan=SMALL)[0]):
        assert torch.isfinite(_armor.reconstruct(f)).all()


def test_normalisation_folds_into_the_wrappers(problem: Problem) -> None:
    W, h, _ = problem
    N = normalise(W)
    f, _ = _armor.paper(N.W.double(), h, BO, BI, iters=5)
    r1, r2 = N.r1.double(), N.r2.double()
    A, B = f.A * r2.view(N0, BO, 1), f.B * r1.view(N1, 1, BI)
    W_hat = _armor.reconstruct(f) * r2.unsqueeze(1) * r1
    assert torch.allclose(_armor.reconstruct(Factors(A, B, f.S, f.mask)), W_hat)
    x = _random(5, I)
    y = right(right(x, B.transpose(1, 2)) @ f.S.T, A.transpose(1, 2))
    assert torch.allclose(y, x @ W_hat.T)


GOLDEN = json.loads((ROOT / "tests" / "golden" / "armor_stories15M.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['linear'].split('.')[-1]}-{c['b_out']}-{c['b_in']}")
def test_the_official_code_goes_the_same_way(case: dict[str, Any]) -> None:
    W = load_file(EXAMPLE / "model.safetensors")[f"{case['linear']}.weight"].float()
    h = torch.frombuffer(bytearray.fromhex(GOLDEN["h"][case["linear"]]), dtype=torch.float32)
    f = start(normalise(W).W, h, case["b_out"], case["b_in"], 2, 4)
    rows_ = torch.frombuffer(bytearray.fromhex(GOLDEN["mask"][case["linear"]]), dtype=torch.uint8)
    theirs = (rows_.unsqueeze(1) >> torch.arange(8) & 1).view(-1, W.shape[1]).bool()
    assert float((theirs == f.mask[: len(theirs)]).float().mean()) >= 0.999
    iters = int(case["recompute"])
    _, trace = _armor.paper(normalise(W).W, h, case["b_out"], case["b_in"], iters=iters, lr=case["lr"], seed=case["seed"])
    assert trace["L0"] == pytest.approx(case["L0"], rel=1e-5)
    for at, loss_ in case["losses"].items():
        if int(at) <= iters:
            assert trace["losses"][int(at) - 1] == pytest.approx(loss_, rel=0.02)  # draws differ where gradients round otherwise

"""Task masks: the identities of the specification, and packing."""

from __future__ import annotations

import hashlib
import itertools
import json
import math

import pytest
import torch
from compress_kernels import masked_delta as kernel
from compress_kernels.masked_delta import reference
from conftest import EXAMPLE, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from compress.errors import CompressError
from compress.formats import masked_delta
from compress.methods import _merging, _taskmask, bitdelta, consensus, emr, tall_ta, tallmask, task_arithmetic, ties
from compress.methods._taskmask import LAMBDAS


def deltas(tasks: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian deltas (T, …)."""
    return torch.randn(tasks, *(shape or (40, 50)), generator=torch.Generator().manual_seed(seed))


def error(tau: torch.Tensor, d: torch.Tensor) -> float:
    """|tau - d|² / |tau|²."""
    return float((tau - d).square().sum() / tau.square().sum())


def reconstructed(method, tau: torch.Tensor, config, lam: float = 1.0) -> tuple[list[torch.Tensor], list[float]]:
    """What a bundle method makes of deltas (T, R, C) when its vector is stored exactly, and its own figures for the errors."""
    sums = _taskmask.moments(tau)
    v = method.shared(tau, sums, config, None)
    factors = method.provisional(sums, config)
    bits = [method.bits(t, v, f, lam, config) for t, f in zip(tau, factors, strict=True)]
    d = [_taskmask.apply(b, v, config.are_signs).expand(tau[0].shape) for b in bits]
    full = _taskmask.products(list(tau), d, bits)
    scales = method.scales([full], config)[0]
    return [s * x for s, x in zip(scales, d, strict=True)], full.errors(scales)


# -- TALL masks (1.6) ------------------------------------------------------------------------------------------------------


def test_one_task_is_exact_for_any_lambda() -> None:
    tau = deltas(1)
    tau[:, :3] = 0
    for lam in (0.0, 0.2, 1.0, 1e9):
        mask = _taskmask.tall(tau[0], tau.sum(0), lam)
        assert torch.equal(mask, tau[0] != 0)
        assert torch.equal(mask * tau.sum(0), tau[0])


def test_lambda_0_keeps_every_touched_weight() -> None:
    tau = deltas(4)
    tau[1, ::3] = 0
    assert torch.equal(_taskmask.tall(tau[1], tau.sum(0), 0.0), tau[1] != 0)


def test_an_infinite_lambda_keeps_only_exact_agreement() -> None:
    tau = deltas(3)
    tau[1:, 5:9] = 0  # there the sum is task 0's own delta
    mask = _taskmask.tall(tau[0], tau.sum(0), 1e30)
    assert torch.equal(mask, (tau.sum(0) == tau[0]) & (tau[0] != 0))
    assert mask[5:9].all()


def test_masks_are_nested_in_lambda() -> None:
    tau = deltas(5)
    masks = [_taskmask.tall(tau[2], tau.sum(0), lam) for lam in LAMBDAS]
    assert all((small | ~large).all() for small, large in itertools.pairwise(masks))
    densities = [float(m.float().mean()) for m in masks]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[-1]


@pytest.mark.parametrize("p", [0.5, 1, 2, 7])
def test_lambda_1_is_the_best_mask_in_every_norm(p: float) -> None:
    tau = deltas(3)
    v, t = tau.sum(0), tau[1]
    mask = _taskmask.tall(t, v, 1.0)
    assert torch.equal(mask, (v * t > 0) & (v.abs() < 2 * t.abs()))
    least = torch.minimum(t.abs(), (t - v).abs()).double().pow(p).sum()
    assert float((t - mask * v).abs().double().pow(p).sum()) == pytest.approx(float(least), rel=1e-12)


def test_signs_agree_from_lambda_1_on_and_may_not_below() -> None:
    tau = deltas(6)
    v = tau.sum(0)
    for lam in (1.0, 1.5):
        mask = _taskmask.tall(tau[0], v, lam)
        assert (v.sign() == tau[0].sign())[mask].all()
    assert not (v.sign() == tau[0].sign())[_taskmask.tall(tau[0], v, 0.2)].all()


def test_copies_of_one_task_empty_the_mask() -> None:
    one = deltas(1)[0]
    for count in (2, 3, 5, 8, 11):
        v = one * count
        for lam in (0.09, 0.2, 0.26, 0.6, 1.1):
            kept = _taskmask.tall(one, v, lam)
            assert bool(kept.all()) == (lam < 1 / (count - 1)), (count, lam)
            assert bool(kept.any()) == bool(kept.all())


def test_disjoint_supports_are_exact_for_every_lambda_and_mode() -> None:
    tau = torch.zeros(3, 30, 40)
    for t in range(3):
        tau[t, 10 * t : 10 * t + 10] = deltas(1, 10, 40, seed=t)[0]
    for lam in (0.2, 1.0, 50.0):
        got, _ = reconstructed(tallmask, tau, tallmask.Config(mode="mask", rescale=False), lam)
        assert all(torch.equal(a, b) for a, b in zip(got, tau, strict=True))
    got, errors = reconstructed(tallmask, tau, tallmask.Config(mode="refined"))
    assert max(errors) < 1e-6  # a factor is rounded to fp16
    assert torch.equal(_taskmask.refined(tau), tau.sum(0))


def test_scale_and_order_of_the_tasks_do_not_matter() -> None:
    tau, order = deltas(4), [2, 0, 3, 1]
    for lam in (0.3, 1.0):
        masks = [_taskmask.tall(t, tau.sum(0), lam) for t in tau]
        scaled = tau * 2.0**-9
        assert all(torch.equal(m, _taskmask.tall(t, scaled.sum(0), lam)) for m, t in zip(masks, scaled, strict=True))
        swapped = tau[order].double()  # in fp64 sums of so few do not depend on the order enough to move a mask
        again = [_taskmask.tall(t, swapped.sum(0), lam) for t in swapped]
        first = [_taskmask.tall(t, tau.double().sum(0), lam) for t in tau.double()]
        assert all(torch.equal(first[j], again[i]) for i, j in enumerate(order))
    assert torch.equal(_taskmask.refined(tau), _taskmask.refined(tau[order]))


@pytest.mark.parametrize(("tasks", "lam", "want"), [(8, 0.4, 0.482), (20, 0.4, 0.332), (2, 1.0, 0.5), (8, 1.0, 0.2301)])
def test_the_density_of_gaussian_deltas_is_the_formulas(tasks: int, lam: float, want: float) -> None:
    tau = deltas(tasks, 300, 400, seed=tasks)
    density = float(_taskmask.tall(tau[0], tau.sum(0), lam).float().mean())
    assert 1 - 2 / math.pi * math.atan(lam * math.sqrt(tasks - 1)) == pytest.approx(want, abs=1e-3)
    assert density == pytest.approx(want, abs=0.006)  # four standard deviations of 120,000 draws


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 131), st.integers(0, 1000))
def test_planes_survive_packing(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.3
    plane = masked_delta.pack_mask(mask)
    assert plane.shape == (rows, -(-columns // 32))
    assert torch.equal(masked_delta.unpack_mask(plane, columns), mask)
    coded = masked_delta.deflate(plane)
    assert coded is None or torch.equal(masked_delta.inflate(coded, (rows, columns)), plane)


def test_bits_lie_lowest_first_and_the_last_are_zero() -> None:
    mask = torch.zeros(2, 34, dtype=torch.bool)
    mask[0, 0] = mask[0, 33] = mask[1, 31] = True
    assert masked_delta.pack_mask(mask).tolist() == [[1, 2], [-(2**31), 0]]


def test_coding_pays_only_where_it_saves() -> None:
    draw = torch.rand(64, 4096, generator=torch.Generator().manual_seed(1))
    assert masked_delta.deflate(masked_delta.pack_mask(draw < 0.5)) is None
    sparse = masked_delta.pack_mask(draw < 0.1)
    coded = masked_delta.deflate(sparse)
    assert coded is not None
    assert len(coded) / (4 * sparse.numel()) == pytest.approx(0.479, abs=0.01)  # the specification's table
    assert torch.equal(masked_delta.inflate(coded, (64, 4096)), sparse)
    for damaged in (coded[:-5], torch.cat([coded[:40], coded[50:]])):
        with pytest.raises(CompressError):
            masked_delta.inflate(damaged, (64, 4096))
    with pytest.raises(CompressError, match="wanted"):
        masked_delta.inflate(coded, (65, 4096))


def test_trimming_keeps_one_more_than_the_share_and_every_tie() -> None:
    tau = deltas(1, 100, 10)[0]
    for density in (0.2, 0.05, 0.999, 1.0):
        rank = _taskmask.cut(tau.numel(), density)
        high, inner = _taskmask.at_rank(_taskmask.bins(tau), rank)
        low, _ = _taskmask.at_rank(_taskmask.bins(tau, high), inner)
        threshold = _taskmask.from_bins(high, low)
        assert threshold == float(tau.abs().flatten().sort().values[rank])
        kept = _taskmask.trimmed(tau[None], [threshold])[0]
        assert int((kept != 0).sum()) == min(int(1000 * density) + 1, 1000)
    tied = torch.ones(10, 10)
    assert _taskmask.trimmed(tied[None], [1.0]).all()


# -- the official code -----------------------------------------------------------------------------------------------------

GOLDEN = json.loads((ROOT / "tests" / "golden" / "tallmask_stories15M.json").read_text())


@pytest.fixture(scope="module")
def golden_deltas() -> torch.Tensor:
    """tau (4, P) of three tensors of the example and seeded fine-tunes, flattened in the order of their names, fp32."""
    weights = load_file(EXAMPLE / "model.safetensors")
    rows = []
    for task in range(4):
        g = torch.Generator().manual_seed(100 + task)
        row = []
        for name in GOLDEN["tensors"]:
            W = weights[name]
            noise = 0.01 * torch.randn(W.shape, generator=g) * (torch.rand(W.shape, generator=g) < 0.7)
            row.append(((W.float() + noise).half().float() - W.float()).flatten())
        rows.append(torch.cat(row))
    return torch.stack(rows)


def digest(mask: torch.Tensor) -> str:
    """sha256 of the bits, lowest first."""
    plane = masked_delta.pack_mask(mask[None])
    return hashlib.sha256(plane.numpy().tobytes()[: -(-mask.numel() // 8)]).hexdigest()


def ties_trim(tau: torch.Tensor, density: float) -> tuple[list[float], float]:
    limits = []
    for t in tau:
        high, inner = _taskmask.at_rank(_taskmask.bins(t), _taskmask.cut(t.numel(), density))
        limits.append(_taskmask.from_bins(high, _taskmask.at_rank(_taskmask.bins(t, high), inner)[0]))
    return limits, float(_taskmask.trimmed(tau, limits).sum(0).sign().sum().sign())


@pytest.mark.parametrize("vector", ["sum", "ties"])
def test_masks_are_the_official_codes_bit_for_bit(vector: str, golden_deltas: torch.Tensor) -> None:
    v = _merging.total(golden_deltas, None if vector == "sum" else ties_trim(golden_deltas, 0.2))
    for lam in (0.2, 0.4, 0.6, 1.0):
        known = GOLDEN["masks"][f"{vector} {lam}"]
        assert known["official_float32_differs"] == known["ours_differ"] == 0
        masks = [_taskmask.tall(t, v, lam) for t in golden_deltas]
        assert [digest(m) for m in masks] == known["sha256"], lam
    if vector == "sum":
        masks = [_taskmask.tall(t, v, 0.4) for t in golden_deltas]
        count = torch.stack(masks).sum(0)
        assert torch.equal(_merging.counts(golden_deltas, v, [0.4] * 4).long(), count)
        assert {str(k): digest(count >= k) for k in range(6)} == GOLDEN["consensus"]


# -- consensus (2.6) and merging -------------------------------------------------------------------------------------------


def test_consensus_by_k() -> None:
    tau = deltas(4)
    v, lambdas = tau.sum(0), [0.3, 0.5, 0.4, 1.0]
    masks = torch.stack([_taskmask.tall(t, v, lam) for t, lam in zip(tau, lambdas, strict=True)])
    keep = [_merging.consensus(tau, v, lambdas, k) != 0 for k in range(6)]
    assert torch.equal(_merging.consensus(tau, v, lambdas, 0), v)
    assert torch.equal(keep[1], masks.any(0))
    assert torch.equal(keep[4], masks.all(0))
    assert not keep[5].any()
    assert all((small <= large).all() for large, small in itertools.pairwise(keep))
    got = consensus.merged(tau, lambdas, consensus.Config(k=2), None)
    assert torch.equal(got, v * (masks.sum(0) >= 2))
    assert torch.equal(tall_ta.merged(tau, lambdas, tall_ta.Config(), None), v * masks.any(0))


def test_one_task_and_k_1_is_that_model() -> None:
    tau = deltas(1)
    assert torch.equal(consensus.merged(tau, [0.2], consensus.Config(k=1), None), tau[0])


def test_ties_elects_signs_and_averages_those_that_agree() -> None:
    tau = torch.tensor([[[3.0, -1.0, 0.5, 2.0]], [[1.0, -2.0, 0.1, -2.0]], [[-2.0, 4.0, 0.2, 0.0]]])
    got = ties.merged(tau, [], ties.Config(), ([0.3, 0.3, 0.3], -1.0))
    assert got.tolist() == [[2.0, 4.0, 0.5, -2.0]]  # the last: a sum of 0 takes the majority's sign
    summed = consensus.merged(tau, [0.0] * 3, consensus.Config(vector="ties", k=0), ([0.3] * 3, 1.0))
    assert summed.tolist() == [[4.0, 4.0, 0.5, 2.0]]
    assert torch.equal(task_arithmetic.merged(tau, [], task_arithmetic.Config(), None), tau.sum(0))


# -- sign (3.6) ------------------------------------------------------------------------------------------------------------


def test_sign_of_one_task_is_exact_and_of_gaussians_as_derived() -> None:
    for tasks in (1, 2, 4, 8):
        tau = deltas(tasks, 200, 300, seed=tasks)
        got, errors = reconstructed(tallmask, tau, tallmask.Config(mode="sign"))
        want = (1 - 2 / math.pi) * (1 - 1 / tasks)
        for t, d, e in zip(tau, got, errors, strict=True):
            assert e == pytest.approx(error(t, d), abs=1e-6)
            assert e == pytest.approx(want, abs=0.004)
            assert tasks == 1 or e < 1 - 2 / math.pi


def test_the_sizes_of_the_tasks_change_only_their_factors() -> None:
    tau, sizes = deltas(3), torch.tensor([1.0, 0.01, 30.0]).view(3, 1, 1)
    config = tallmask.Config(mode="sign")
    mine = tallmask.shared(tau, _taskmask.moments(tau), config, None)
    theirs = tallmask.shared(tau * sizes, _taskmask.moments(tau * sizes), config, None)
    assert torch.allclose(mine / mine.mean(), theirs / theirs.mean(), rtol=1e-5)
    _, errors = reconstructed(tallmask, tau, config)
    _, scaled = reconstructed(tallmask, tau * sizes, config)
    assert scaled == pytest.approx(errors, abs=1e-5)


# -- refined (4.6) ---------------------------------------------------------------------------------------------------------


def alternated(u: torch.Tensor, start: torch.Tensor, rounds: int = 12) -> list[tuple[torch.Tensor, float]]:
    """The specification's alternation from one start: v and the error after every round."""
    v, out = start, []
    for _ in range(rounds):
        active = (u - v).abs() < u.abs()
        count = active.sum(0)
        v = torch.where(count > 0, (u * active).sum(0) / count.clamp(min=1), v)
        out.append((v, float(torch.minimum(u.square(), (u - v).square()).double().sum())))
    return out


@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
@pytest.mark.parametrize("tails", [False, True])
def test_refined_is_never_worse_than_alternation_from_any_start(tasks: int, tails: bool) -> None:
    u = deltas(tasks, seed=tasks)
    u = u.pow(3) if tails else u + 0.7 * deltas(1, seed=99)  # heavy tails; correlated tasks
    least = torch.minimum(u.square(), (u - _taskmask.refined(u)).square()).double().sum()
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    for start in (u.sum(0), u.mean(0), largest):
        rounds = alternated(u, start)
        assert all(b <= a * (1 + 1e-9) for (_, a), (_, b) in itertools.pairwise(rounds))
        assert float(least) <= rounds[-1][1] * (1 + 1e-6)
    assert float(least) <= float(torch.minimum(u.square(), (u - u.sum(0)).square()).double().sum())


def test_refined_is_the_least_of_all_masks_and_vectors() -> None:
    u = deltas(4, 6, 7)
    found = torch.minimum(u.square(), (u - _taskmask.refined(u)).square()).sum(0)
    best = torch.full_like(found, torch.inf)
    for subset in range(16):
        active = torch.tensor([subset >> t & 1 for t in range(4)], dtype=torch.bool).view(4, 1, 1)
        v = (u * active).sum(0) / max(int(active.sum()), 1)
        best = torch.minimum(best, torch.where(active, (u - v).square(), u.square()).sum(0))
    assert torch.allclose(found, best, atol=1e-6)


def test_refined_is_exact_for_one_task_and_for_equal_ones() -> None:
    for count in (1, 2, 6):
        tau = deltas(1).expand(count, -1, -1).contiguous()
        got, errors = reconstructed(tallmask, tau, tallmask.Config(mode="refined"))
        assert max(errors) < 1e-6
        assert torch.allclose(got[0], tau[0], rtol=1e-3)


@pytest.mark.parametrize(("tasks", "most"), [(2, 0.13), (4, 0.25), (8, 0.36)])
def test_refined_beats_mask_on_gaussian_deltas(tasks: int, most: float) -> None:
    tau = deltas(tasks, 100, 200, seed=tasks)
    _, mask = reconstructed(tallmask, tau, tallmask.Config(mode="mask"))
    _, best = reconstructed(tallmask, tau, tallmask.Config(mode="refined"))
    assert sum(best) / tasks < most
    assert sum(best) < 0.75 * sum(mask)


def test_levels_are_the_two_means_of_every_coordinate() -> None:
    u = deltas(5, 6, 7)
    low, high = _taskmask.levels(u)
    found = torch.minimum((u - low).square(), (u - high).square()).sum(0)
    best = torch.full_like(found, torch.inf)
    for subset in range(32):
        one = torch.tensor([subset >> t & 1 for t in range(5)], dtype=torch.bool).view(5, 1, 1)
        parts = [(u * side).sum(0) / max(int(side.sum()), 1) for side in (one, ~one)]
        best = torch.minimum(best, torch.where(one, (u - parts[0]).square(), (u - parts[1]).square()).sum(0))
    assert torch.allclose(found, best, atol=1e-5)
    assert (low <= high).all()
    for tasks in (1, 2):
        assert torch.allclose(_taskmask.levels(deltas(tasks)), deltas(tasks).sort(0).values.expand(2, -1, -1), atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_levels_lose_less_than_any_single_vector(tasks: int) -> None:
    tau = deltas(tasks, 100, 200, seed=tasks)
    _, refined = reconstructed(tallmask, tau, tallmask.Config(mode="refined"))
    _, sign = reconstructed(tallmask, tau, tallmask.Config(mode="sign"))
    _, found = reconstructed(tallmask, tau, tallmask.Config(mode="levels"))
    assert sum(found) < 0.9 * min(sum(refined), sum(sign))
    assert tasks > 2 or max(found) < 1e-6


def test_rescaling_never_hurts() -> None:
    tau = deltas(5) * torch.tensor([1.0, 0.2, 3.0, 1.0, 0.7]).view(-1, 1, 1)
    for mode in tallmask.MODES:
        _, with_it = reconstructed(tallmask, tau, tallmask.Config(mode=mode, rescale=True))
        _, without = reconstructed(tallmask, tau, tallmask.Config(mode=mode, rescale=False))
        assert all(a <= b + 1e-6 for a, b in zip(with_it, without, strict=True)), mode


# -- EMR (5.6) and BitDelta (6.6) ------------------------------------------------------------------------------------------


def test_emr_of_one_task_is_exact() -> None:
    tau = deltas(1)
    tau[0, :4] = 0
    v = emr.shared(tau, _taskmask.moments(tau), emr.Config())
    mask = emr.bits(tau[0], v, 1.0, 1.0, emr.Config())
    assert torch.equal(v, tau[0])
    assert torch.equal(mask, tau[0] != 0)
    got, errors = reconstructed(emr, tau, emr.Config())
    assert errors == [0.0]
    assert torch.equal(got[0], tau[0])


def test_emr_follows_its_tasks_when_they_are_permuted() -> None:
    tau, order = deltas(4), [3, 1, 0, 2]
    v = emr.shared(tau, _taskmask.moments(tau), emr.Config())
    assert torch.allclose(v, emr.shared(tau[order], _taskmask.moments(tau[order]), emr.Config()))
    assert (tau.abs().amax(0) >= v.abs()).all()
    sums = _taskmask.products(list(tau), [t * 0.5 for t in tau], [t > 0 for t in tau])
    small = _taskmask.products(list(tau[:, :2]), list(tau[:, :2]), [t > 0 for t in tau[:, :2]])
    g = emr.scales([sums, small], emr.Config())
    means = [(sums.tau1[t] / sums.count + small.tau1[t] / small.count) for t in range(4)]
    found = [(sums.d1[t] / sums.count + small.d1[t] / small.count) for t in range(4)]
    assert g[0] == g[1] == pytest.approx([a / b for a, b in zip(means, found, strict=True)], rel=1e-3)


def test_bitdelta_loses_what_its_formula_says() -> None:
    tau = deltas(3, 200, 300) * torch.tensor([1e-7, 1e-8, 1e-6]).view(-1, 1, 1)  # fp16 alone could not hold the scales
    tau[0, :5] = 0
    got, errors = reconstructed(bitdelta, tau, bitdelta.Config())
    for t, d, e in zip(tau, got, errors, strict=True):
        s = float(t.abs().mean())
        want = float(t.square().sum()) - t.numel() * s**2
        assert float((t - d).square().sum()) == pytest.approx(want, rel=1e-4)
        assert torch.equal(d > 0, t >= 0)
        assert e == pytest.approx(error(t, d), abs=1e-6)
    assert errors[1] == pytest.approx(1 - 2 / math.pi, abs=0.004)


# -- storing, format, kernel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("columns", [256, 96, 50])
def test_what_is_stored_is_what_is_read_back(kind: str, signed: bool, columns: int) -> None:
    v = deltas(1, 9, columns)[0] * 1e-6
    v = v if signed else v.abs()
    v[2] = 0
    kept = _taskmask.store(v, kind, signed)
    params = {"shared": kind, "signs": not signed, "group_size": _taskmask.group_size(kind, columns)}
    if kept.values is not None:
        tensors = {"shared": kept.values}
    else:
        assert kept.codes is not None
        assert kept.scale is not None
        bits = masked_delta.width(kind)
        tensors = {"shared_packed": masked_delta.pack_codes(kept.codes, bits), "shared_scale": kept.scale}
    mask = deltas(1, 9, columns, seed=4)[0] > 0
    packed = masked_delta.pack(tensors, params, mask, 0.7)
    spec = masked_delta.spec(params, (9, columns), "F16")
    assert {s: (t.dtype, tuple(t.shape)) for s, t in packed.tensors.items()} == {
        s: ({"BF16": torch.bfloat16, "I32": torch.int32, "F16": torch.float16}[d], size) for s, (d, size) in spec.items()
    }
    back, bits_back, scale = masked_delta.unpack(packed)
    assert torch.equal(back, kept.v)
    assert torch.equal(bits_back, mask)
    assert scale == _taskmask.half(0.7)
    assert not back[2].any()
    limit = {"bf16": 1e-5, "int8": 2e-4, "int4": 0.03}[kind] * (1 if columns != 50 else 2)
    assert error(v, back) < limit
    want = scale * _taskmask.apply(mask, back, not signed)
    assert torch.equal(masked_delta.dequantize(packed), want)


def test_the_bytes_of_version_1() -> None:
    v = torch.arange(-35, 35, dtype=torch.float32).view(2, 35) / 64
    kept = _taskmask.store(v, "int4", True)
    assert kept.codes is not None
    assert masked_delta.pack_codes(kept.codes, 4).tolist() == GOLDEN_WORDS
    assert kept.scale is not None
    assert kept.scale.view(torch.int16).tolist() == GOLDEN_SCALE
    plane = masked_delta.pack_mask(v.abs() > 0.2)
    assert plane.tolist() == [[8388607, 0], [-8192, 7]]
    assert masked_delta.VERSION == 1
    stream = torch.frombuffer(bytearray(GOLDEN_STREAM), dtype=torch.uint8)  # whatever zlib writes, this must be read
    assert torch.equal(masked_delta.inflate(stream, (8, 256)), torch.ones(8, 8, dtype=torch.int32))


GOLDEN_WORDS = [[286326784, 858989090, 1431585859, 2004248165, 2183], [-1449551736, -1145328982, -572732212, -1118483, 4095]]
GOLDEN_SCALE = [[15750], [15761]]

GOLDEN_STREAM = bytes.fromhex(
    "780105c101010000008010fd3f1d218410420821841042082184104208218410420821841042082184104208218410420821841042080321800041"
)


def problem(are_signs: bool, dtype: torch.dtype):
    g = torch.Generator().manual_seed(3)
    O, I = 37, 70
    W0 = torch.randn(O, I, generator=g).to(dtype)
    v = torch.randn(O, I, generator=g) * 0.1
    kept = _taskmask.store(v.abs() if are_signs else v, "int8", not are_signs)
    assert kept.codes is not None
    shared = kernel.Shared(masked_delta.pack_codes(kept.codes, 8), kept.scale, 8, 0 if are_signs else 128)
    masks = {t: torch.rand(O, I, generator=g) < 0.4 for t in "ab"}
    deltas_ = {t: kernel.Delta(masked_delta.pack_mask(m), s) for (t, m), s in zip(masks.items(), (1.5, 0.25), strict=True)}
    dense = {t: W0.float() + d.scale * _taskmask.apply(masks[t], kept.v, are_signs) for t, d in deltas_.items()}
    return W0, shared, deltas_, {**dense, None: W0.float()}, g


@pytest.mark.parametrize("are_signs", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_a_mixed_batch_equals_the_dense_weights_and_the_loop(are_signs: bool, dtype: torch.dtype, tolerance: float) -> None:
    W0, shared, owned, dense, g = problem(are_signs, dtype)
    x, bias = torch.randn(5, 3, 70, generator=g).to(dtype), torch.randn(37, generator=g).to(dtype)
    tasks = ["b", None, "a", "b", "a"]
    y = kernel.linear(x, W0, bias, shared, owned, are_signs, tasks)
    for i, task in enumerate(tasks):
        want = torch.nn.functional.linear(x[i].float(), dense[task], bias.float())
        assert float((y[i].float() - want).norm() / want.norm()) < tolerance
        alone = kernel.linear(x[i : i + 1], W0, bias, shared, owned, are_signs, [task])
        assert torch.allclose(alone[0], y[i], rtol=tolerance, atol=tolerance)
    base = torch.nn.functional.linear(x[1], W0, bias)  # up to the order of summation, as one pass serves all rows
    assert float((y[1] - base).float().norm() / base.float().norm()) < tolerance
    flat = kernel.linear(x.view(15, 70), W0, bias, shared, owned, are_signs, tasks)
    assert torch.allclose(flat.view(5, 3, 37), y, rtol=tolerance, atol=tolerance)


def test_an_empty_mask_is_the_base_and_a_full_one_the_merged_weight() -> None:
    W0, shared, _, _, g = problem(False, torch.bfloat16)
    x = torch.randn(2, 70, generator=g).bfloat16()
    none = kernel.Delta(masked_delta.pack_mask(torch.zeros(37, 70, dtype=torch.bool)), 1.0)
    full = kernel.Delta(masked_delta.pack_mask(torch.ones(37, 70, dtype=torch.bool)), 1.0)
    y = kernel.linear(x, W0, None, shared, {"e": none, "f": full}, False, ["e", "f"])
    base = torch.nn.functional.linear(x[0], W0)
    assert float((y[0] - base).float().norm() / base.float().norm()) < 6e-3
    want = x[1].float() @ (W0.float() + kernel.decode_shared(shared, 70)).T
    assert float((y[1].float() - want).norm() / want.norm()) < 6e-3


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    W0, shared, owned, _, g = problem(False, torch.float32)
    x = torch.randn(4, 70, generator=g)
    whole = kernel.linear(x, W0, None, shared, owned, False, ["a", "b", "a", "b"])
    monkeypatch.setattr(reference, "TILE", 70 * 5)
    assert torch.allclose(kernel.linear(x, W0, None, shared, owned, False, ["a", "b", "a", "b"]), whole, atol=1e-6)
    with pytest.raises(ValueError, match="4 rows"):
        kernel.linear(x, W0, None, shared, owned, False, ["a", "b", "a"])

"""The common quantizer: identities of the specification, section 1."""

from __future__ import annotations

import pytest
import torch

from compress.formats import int_grouped
from compress.methods._pack import quantize
from compress.methods._quantizer import Grid, encode, fake, fit


def grid(bits: int = 4, group: int = 32, symmetric: bool = False, dtype: torch.dtype = torch.float32, **kw: object) -> Grid:
    return Grid(bits, group, symmetric, dtype, **kw)  # type: ignore[arg-type]


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_stays_within_half_a_step_and_zero_stays_zero(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    W = weights(64, 128)
    W[:, ::9] = 0
    g = grid(bits, 32, symmetric, dtype)
    scale, zero = fit(W, g)
    error = (fake(W, g) - W).abs().view(64, 4, 32) / scale.unsqueeze(-1)
    # a scale rounded down cuts the range: by (2^b - 1) u steps, u the unit of rounding; symmetric "full" clamps +max by half a step
    slack = {torch.float32: 1e-4, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype] * (2**bits)
    assert error.max() <= 0.5 + slack
    assert torch.equal(fake(W, g)[:, ::9], torch.zeros_like(W[:, ::9]))
    assert zero.min() >= 0
    assert zero.max() <= 2**bits - 1


def test_eight_bit_asymmetric_scales_in_bfloat16_are_rounded_up() -> None:
    W = weights(256, 128)
    scale, _ = fit(W, grid(8, 128, False, torch.bfloat16))
    error = (fake(W, grid(8, 128, False, torch.bfloat16)) - W).abs() / scale
    assert error.max() <= 0.5 + 1e-3  # rounded to nearest it would reach 1.37 steps


def test_quantizing_twice_changes_nothing() -> None:
    g = grid(3)
    W = fake(weights(16, 64), g)
    scale, zero = fit(weights(16, 64), g)
    again = (encode(W, scale, zero, g).float().view(16, 2, 32) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    assert torch.equal(again.view(16, 64), W)


def test_a_power_of_two_factor_passes_through() -> None:
    W, g = weights(16, 64), grid(4)
    assert torch.equal(fake(W * 4, g) / 4, fake(W, g))


def test_a_group_of_one_sign_survives_only_with_the_extended_range() -> None:
    W = torch.rand(4, 32, generator=torch.Generator().manual_seed(1)) + 10
    assert (fake(W, grid(3, extend_zero=False)) - W).abs().max() > 9
    scale, _ = fit(W, grid(3))
    assert (fake(W, grid(3)) - W).abs().max() <= scale.max() / 2 + 1e-5


def test_all_zero_groups_and_rows_are_harmless() -> None:
    W = weights(8, 64)
    W[0] = 0
    W[1, :32] = 0
    for g in (grid(4), grid(4, symmetric=True), grid(3, -1), grid(4, mse_clip=True)):
        W_hat = fake(W, g)
        assert torch.isfinite(W_hat).all()
        assert not W_hat[0].any()


def test_clip_search_never_raises_its_own_loss() -> None:
    W = weights(32, 128) ** 3
    plain = (fake(W, grid(3)) - W).abs().pow(2.4).view(32, 4, 32).sum(-1)
    clipped = (fake(W, grid(3, mse_clip=True)) - W).abs().pow(2.4).view(32, 4, 32).sum(-1)
    assert (clipped <= plain * (1 + 1e-6)).all()
    assert clipped.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_artifact_holds_exactly_what_the_quantizer_made(dtype: torch.dtype) -> None:
    W, g = weights(48, 96), grid(3, dtype=dtype)
    packed, error = quantize(W, g)
    scale, zero = fit(W, g)
    q, stored, z = int_grouped.unpack(packed)
    assert torch.equal(q, encode(W, scale, zero, g))
    assert torch.equal(stored.float(), scale)
    assert z is not None
    assert torch.equal(z.float(), zero)
    assert torch.equal(int_grouped.dequantize(packed), fake(W, g))
    assert error == pytest.approx(float((fake(W, g) - W).norm() / W.norm()), rel=1e-5)


def test_the_two_symmetric_rules_give_their_scales() -> None:
    W = weights(4, 32)
    most = W.abs().amax(1)
    assert torch.allclose(fit(W, grid(4, symmetric=True))[0][:, 0], most / 7.5)
    assert torch.allclose(fit(W, grid(4, symmetric=True, sym_scale="restricted"))[0][:, 0], most / 7)

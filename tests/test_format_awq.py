"""AWQ's gemm layout: frozen bytes, exact round trips, and the same values as int_grouped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.checkpoint import dtypes
from compress.errors import CompressError
from compress.formats import awq, int_grouped


def random_grid(rows: int, groups: int, group_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (O, I), fp16 scales (O, G) and zeros (O, G)."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, groups * group_size), generator=g, dtype=torch.uint8)
    zero = torch.randint(0, 16, (rows, groups), generator=g, dtype=torch.uint8)
    return q, torch.rand(rows, groups, generator=g).half() + 0.01, zero


def test_values_0_to_7_pack_to_the_order_of_autoawq() -> None:
    q = torch.arange(8, dtype=torch.uint8).view(8, 1)
    packed = awq.pack(q, torch.ones(8, 1).half(), q.clone(), bits=4, group_size=1)
    assert packed.tensors["qweight"].tolist() == [[0x75316420]]
    assert packed.tensors["qzeros"].tolist() == [[0x75316420]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 8, 17]), st.integers(0, 9))
def test_unpack_returns_what_was_packed(octets: int, groups: int, group_size: int, seed: int) -> None:
    q, scale, zero = random_grid(8 * octets, groups, group_size, seed)
    packed = awq.pack(q, scale, zero, bits=4, group_size=group_size)
    assert all(map(torch.equal, awq.unpack(packed), (q, scale, zero)))
    plain = int_grouped.pack(q, scale, zero, bits=4, group_size=group_size)
    assert torch.equal(awq.dequantize(packed), int_grouped.dequantize(plain))


def test_symmetric_weights_are_stored_with_zeros_of_eight() -> None:
    q, scale, _ = random_grid(16, 2, 32, 0)
    packed = awq.pack(q, scale, None, bits=4, group_size=32)
    assert awq.unpack(packed)[2].unique().tolist() == [8]
    assert torch.equal(awq.dequantize(packed), int_grouped.dequantize(int_grouped.pack(q, scale, None, bits=4, group_size=32)))


@pytest.mark.parametrize("group_size", [32, -1])
def test_spec_predicts_every_tensor(group_size: int) -> None:
    q, scale, zero = random_grid(16, 2 if group_size == 32 else 1, 32, 0)
    packed = awq.pack(q, scale, zero, bits=4, group_size=group_size)
    found = {name: (dtypes.NAME[t.dtype], tuple(t.shape)) for name, t in packed.tensors.items()}
    assert found == awq.spec(packed.params, packed.shape, "BF16")


def test_scales_become_fp16_and_an_overflow_is_refused() -> None:
    q, scale, zero = random_grid(8, 1, 8, 0)
    assert awq.pack(q, scale.bfloat16(), zero, bits=4, group_size=8).tensors["scales"].dtype == torch.float16
    with pytest.raises(CompressError, match="exceeds fp16"):
        awq.pack(q, scale.float() * 1e6, zero, bits=4, group_size=8)


@pytest.mark.parametrize(("rows", "bits", "why"), [(8, 3, "4 bits, not 3"), (12, 4, "divisible by 8, not 12")])
def test_what_the_layout_cannot_hold_is_refused_with_a_hint(rows: int, bits: int, why: str) -> None:
    q, scale, zero = random_grid(rows, 1, 8, 0)
    with pytest.raises(CompressError, match=why) as caught:
        awq.pack(q, scale, zero, bits=bits, group_size=8)
    assert "pack-quantized" in str(caught.value.hint)
    with pytest.raises(CompressError, match=why):
        awq.spec({"bits": bits, "group_size": 8}, (rows, 8), "F16")

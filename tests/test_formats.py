"""Bytes on disk: round trips for every shape and width, frozen bytes, agreement with compressed-tensors."""

from __future__ import annotations

import hashlib

import pytest
import torch
from compress_kernels import bits as bitpack
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import registry
from compress.errors import CompressError
from compress.formats import int_grouped


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 140), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_packed_codes_unpack_to_themselves(bits: int, rows: int, length: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = bitpack.pack(codes, bits)
    assert words.shape == (rows, bitpack.words(length, bits))
    assert torch.equal(bitpack.unpack(words, bits, length), codes)


def random_packed(bits: int, group: int, symmetric: bool, O: int = 48, I: int = 96) -> int_grouped.Packed:
    g = torch.Generator().manual_seed(bits)
    G = 1 if group == -1 else I // group
    q = torch.randint(0, 2**bits, (O, I), generator=g, dtype=torch.uint8)
    scale = torch.rand(O, G, generator=g) + 0.1
    zero = None if symmetric else torch.randint(0, 2**bits, (O, G), generator=g, dtype=torch.uint8)
    return int_grouped.pack(q, scale, zero, bits=bits, group_size=group)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 96, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_packed_has_the_shapes_that_spec_promised(bits: int, group: int, symmetric: bool) -> None:
    packed = random_packed(bits, group, symmetric)
    spec = int_grouped.spec(packed.params, packed.shape, "F32")
    assert {k: (str(v.dtype), tuple(v.shape)) for k, v in packed.tensors.items()} == {
        k: ({"I32": "torch.int32", "F32": "torch.float32", "I64": "torch.int64"}[d], s) for k, (d, s) in spec.items()
    }
    q, scale, zero = int_grouped.unpack(packed)
    again = int_grouped.pack(q, scale, zero, bits=bits, group_size=group)
    assert all(torch.equal(again.tensors[k], v) for k, v in packed.tensors.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (6, 100), dtype=torch.uint8)
    theirs = helpers.pack_to_int32((codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(bitpack.pack(codes, bits), theirs)


def test_bytes_of_a_fixed_input_are_frozen() -> None:
    digest = hashlib.sha256()
    for bits in (2, 3, 4, 8):
        for value in random_packed(bits, 32, False).tensors.values():
            digest.update(value.numpy().tobytes())
    assert digest.hexdigest() == "a6d80d53cb3872142fb8d6639ba893967fbcc7d7bf442a3ee8a5c00d032f217e"


def test_dequantized_values_follow_the_formula() -> None:
    packed = random_packed(3, 32, False)
    q, scale, zero = int_grouped.unpack(packed)
    assert zero is not None
    expected = (q.double() - zero.double().repeat_interleave(32, 1)) * scale.double().repeat_interleave(32, 1)
    assert torch.equal(int_grouped.dequantize(packed).double(), expected.float().double())


def test_a_three_bit_linear_takes_three_bits_and_its_statistics() -> None:
    assert int_grouped.bits_per_weight(random_packed(3, 32, True, 64, 128)) == pytest.approx(3 + 32 / 32 + 128 / (64 * 128))


def test_unknown_kind_and_unknown_format_are_refused() -> None:
    with pytest.raises(CompressError, match="unknown kind"):
        registry.by_kind("quantum")
    with pytest.raises(CompressError, match="unknown method"):
        registry.load("methods", "awk")

"""Any device, width and pattern: `int_grouped`'s tiles of the kept columns, scattered into tiles of whole rows.

Zeros stay in the artifact's words, which are packed along the output: a tile is a multiple of 32 rows, so it begins on a word
of any width. Memory beyond the artifact's own tensors is one tile, its kept values and their int64 positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compress_kernels import _sparse
from compress_kernels import bits as bitpack
from compress_kernels.int_grouped import reference as int_grouped_reference
from compress_kernels.int_grouped import tiled as int_grouped


class Parts(NamedTuple):
    """A weight's tensors, as stored."""

    meta: torch.Tensor  # (O, bytes) uint8
    words: torch.Tensor  # (O, K) int32, codes of the kept columns
    scale: torch.Tensor  # (O, G)
    zero: torch.Tensor | None  # int32 words packed along the output; None where symmetric


def dequantize(p: Parts, bits: int, n: int, m: int, tile: slice, out: torch.Tensor) -> torch.Tensor:
    """Write the rows `tile` of the weight, which begin at a multiple of 32, into out (R, I) and return it."""
    R, I = out.shape
    zero = None
    if p.zero is not None:
        words = p.zero[tile.start * bits // 32 : bitpack.words(tile.stop, bits)]
        zero = int_grouped_reference.zeros(words, bits, R)
    kept = int_grouped.dequantize(p.words[tile], p.scale[tile], zero, bits, out.new_empty(R, I // m * n))
    return _sparse.scatter(kept, _sparse.decode_positions(p.meta[tile], n, m, I), n, m, out)


def decoder(p: Parts, bits: int, n: int, m: int) -> _sparse.Decode:
    """Decodes tiles of a weight's rows."""

    def decode(tile: slice, out: torch.Tensor) -> None:
        dequantize(p, bits, n, m, tile, out)

    return decode


@torch.library.custom_op("compress_kernels::sparse24_int_linear", mutates_args=())
def linear(
    x: torch.Tensor,
    meta: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    m: int,
    rows: int,
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O), from a weight's `Parts` in tiles of `rows` rows, a multiple of 32."""
    return _sparse.product(x, words.shape[0], rows, decoder(Parts(meta, words, scale, zero), bits, n, m), bias)


@linear.register_fake
def _(
    x: torch.Tensor,
    meta: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    m: int,
    rows: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])

"""Any device, any width: `int_grouped`'s tiles, with the outliers written over each tile before its product.

Scales of a second level and zeros stay in the artifact's words, which are packed along the output, and are decoded with
their tile: a tile is a multiple of 32 rows, so it begins on a word of any width and on 16 rows that share statistics.
Memory beyond the artifact's own tensors is one tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from compress_kernels import bits as bitpack
from compress_kernels.int_grouped import tiled as int_grouped
from compress_kernels.int_grouped_outliers import reference

_ROWS = 32


class Parts(NamedTuple):
    """A weight's tensors, as stored, and where each tile's outliers begin."""

    words: torch.Tensor  # (O, K) int32
    scale: torch.Tensor  # (O, G); with a second level 3-bit codes, int32 words packed along the output
    offset: torch.Tensor | None  # (ceil(O/16), G) with a second level
    step: torch.Tensor | None
    zero: torch.Tensor | None  # int32 words packed along the output; None where symmetric
    indptr: torch.Tensor  # (O+1,) int32
    index: torch.Tensor  # (nnz,) uint16 or int32
    value: torch.Tensor  # (nnz,)
    starts: torch.Tensor  # (tiles+1,) int32 on the CPU: first outlier of each tile, then nnz


def tile_rows(shape: tuple[int, int], device: torch.device) -> int:
    """Rows per tile of a weight (O, I): a multiple of 32."""
    size = int_grouped.TILE if device.type == "cpu" else 8 * int_grouped.TILE
    return _ROWS * max(1, min(-(-shape[0] // _ROWS), size // (_ROWS * shape[1])))


def starts(indptr: torch.Tensor, rows: int) -> torch.Tensor:
    """First outlier of each tile of `rows` rows, then nnz; on the CPU, so that a call waits for no device."""
    return torch.cat((indptr[:-1:rows], indptr[-1:])).cpu()


def _along_output(words: torch.Tensor, bits: int, tile: slice) -> torch.Tensor:
    """Codes (R, G) uint8 of the rows `tile`, from words (ceil(O*bits/32), G)."""
    lines = words[tile.start * bits // 32 : bitpack.words(tile.stop, bits)]
    columns = lines.T.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of a single word per column
    return int_grouped.decode(columns, bits, tile.stop - tile.start).T.contiguous()


def dequantize(p: Parts, bits: int, tile: slice, outliers: slice, out: torch.Tensor) -> torch.Tensor:
    """Write the rows `tile` of the weight, whose outliers are `outliers`, into out (R, I) and return it."""
    if p.offset is None or p.step is None:
        scale = p.scale[tile].float()  # tiles of fp32 are the faster ones, by half with groups of 16 (kernels/README.md)
    else:
        block = slice(tile.start // reference.ROWS, -(-tile.stop // reference.ROWS))
        scale = reference.scales(_along_output(p.scale, reference.SCALE_BITS, tile), p.offset[block], p.step[block])
    zero = None if p.zero is None else _along_output(p.zero, bits, tile)
    int_grouped.dequantize(p.words[tile], scale, zero, bits, out)
    at = reference.positions(p.indptr[tile.start : tile.stop + 1], p.index[outliers], out.shape[1])
    out.view(-1).index_copy_(0, at, p.value[outliers].to(out.dtype))
    return out


@torch.library.custom_op("compress_kernels::int_grouped_outliers_linear", mutates_args=())
def linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    zero: torch.Tensor | None,
    indptr: torch.Tensor,
    index: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    rows: int,
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O), from a weight's `Parts` in tiles of `rows` rows."""
    p = Parts(words, scale, offset, step, zero, indptr, index, value, starts)
    O, I = words.shape[0], x.shape[-1]
    flat = x.reshape(-1, I)
    scratch = x.new_empty(min(O, rows), I)
    out = x.new_empty(len(flat), O)
    bounds = starts.tolist()
    for i, first in enumerate(range(0, O, rows)):
        tile = slice(first, min(first + rows, O))
        W = dequantize(p, bits, tile, slice(bounds[i], bounds[i + 1]), scratch[: tile.stop - tile.start])
        out[:, tile] = F.linear(flat, W, None if bias is None else bias[tile])
    return out.view(*x.shape[:-1], O)


@linear.register_fake
def _(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    zero: torch.Tensor | None,
    indptr: torch.Tensor,
    index: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    rows: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])

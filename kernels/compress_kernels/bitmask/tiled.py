"""Any device: tiles of whole rows, as `int_grouped`'s, which take their values by a running count of the mask's bits.

Memory beyond the artifact's own tensors is one tile, its values again, and 5 bytes per weight for its mask and the count. This is
faster than `masked_scatter_`, which looks at one bit after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress_kernels import _sparse
from compress_kernels.int_grouped.tiled import decode as bits


def dequantize(mask: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the rows with the mask's bytes (R, ceil(I/8)) and all their values into out (R, I) and return it."""
    kept = bits(mask, 1, out.shape[1]).reshape(-1)
    index = kept.cumsum(0, dtype=torch.int32).mul_(kept)  # 1 .. nnz, and 0 where pruned: the zero before the values
    torch.index_select(F.pad(values.to(out.dtype), (1, 0)), 0, index, out=out.view(-1))
    return out


def decoder(mask: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, rows: int) -> _sparse.Decode:
    """Decodes tiles of `rows` rows, whose first values are starts (tiles+1,), on the CPU."""
    bounds = starts.tolist()

    def decode(tile: slice, out: torch.Tensor) -> None:
        i = tile.start // rows
        dequantize(mask[tile], values[bounds[i] : bounds[i + 1]], out)

    return decode


@torch.library.custom_op("compress_kernels::bitmask_linear", mutates_args=())
def linear(
    x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, bias: torch.Tensor | None, rows: int
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O), from the mask's bytes and values (nnz,), in tiles of `rows` rows."""
    return _sparse.product(x, mask.shape[0], rows, decoder(mask, values, starts, rows), bias)


@linear.register_fake
def _(
    x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, bias: torch.Tensor | None, rows: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])

"""Any device, any pattern: tiles of whole rows, as `int_grouped`'s, into which the kept values are scattered.

Memory beyond the artifact's own tensors is one tile and the int64 positions of its values.
"""

from __future__ import annotations

import torch

from compress_kernels import _sparse


def dequantize(values: torch.Tensor, meta: torch.Tensor, n: int, m: int, out: torch.Tensor) -> torch.Tensor:
    """Write the rows with values (R, I*n/m) and their positions' bytes into out (R, I) and return it."""
    return _sparse.scatter(values, _sparse.decode_positions(meta, n, m, out.shape[1]), n, m, out)


def decoder(values: torch.Tensor, meta: torch.Tensor, n: int, m: int) -> _sparse.Decode:
    """Decodes tiles of a weight's rows."""

    def decode(tile: slice, out: torch.Tensor) -> None:
        dequantize(values[tile], meta[tile], n, m, out)

    return decode


@torch.library.custom_op("compress_kernels::sparse24_linear", mutates_args=())
def linear(
    x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, bias: torch.Tensor | None, n: int, m: int, rows: int
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O), from values (O, I*n/m) and their positions' bytes, in tiles of `rows` rows."""
    return _sparse.product(x, values.shape[0], rows, decoder(values, meta, n, m), bias)


@linear.register_fake
def _(
    x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, bias: torch.Tensor | None, n: int, m: int, rows: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])

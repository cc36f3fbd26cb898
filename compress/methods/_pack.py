"""From a weight and a grid to a packed linear."""

from __future__ import annotations

import torch

from compress.formats import int_grouped
from compress.methods._quantizer import Grid, encode, fit
from compress.types import Packed


def quantize(W: torch.Tensor, grid: Grid, fitted: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[Packed, float]:
    """Round W (O, I), any float dtype, to the grid and pack it; `fitted` is (scale, zero) (O, G) where already chosen.

    Also returns the relative Frobenius error of what unpacks again.
    """
    W = W.float().contiguous()
    scale, zero = fit(W, grid) if fitted is None else fitted
    return pack_codes(W, encode(W, scale, zero, grid), scale, zero, grid)


def pack_codes(W: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> tuple[Packed, float]:
    """Pack codes q (O, I) uint8 with scale and zero (O, G); W (O, I) fp32 only for the relative error of what unpacks again."""
    packed = int_grouped.pack(
        q.cpu(),
        scale.to(grid.scale_dtype).cpu(),
        None if grid.symmetric else zero.to(torch.uint8).cpu(),
        bits=grid.bits,
        group_size=grid.group_size,
    )
    return packed, relative_error(W, int_grouped.dequantize(packed))


def relative_error(W: torch.Tensor, W_hat: torch.Tensor) -> float:
    """|W_hat - W| / |W| for W (O, I) fp32; W_hat is overwritten."""
    norm = float(torch.linalg.vector_norm(W))
    error = float(torch.linalg.vector_norm(W_hat.to(W.device).sub_(W)))
    return error / norm if norm else error

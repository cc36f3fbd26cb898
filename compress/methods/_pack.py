"""From a weight and a grid to a packed linear."""

from __future__ import annotations

import torch

from compress.formats import int_grouped
from compress.methods._quantizer import Grid, encode, fit
from compress.types import Packed


def quantize(W: torch.Tensor, grid: Grid, target: torch.Tensor | None = None) -> tuple[Packed, float]:
    """Round W (O, I), any float dtype, to the grid and pack it.

    Also returns the relative Frobenius error of what unpacks again against `target` (default W).
    """
    W = W.float().contiguous()
    scale, zero = fit(W, grid)
    q = encode(W, scale, zero, grid)
    packed = int_grouped.pack(
        q.cpu(),
        scale.to(grid.scale_dtype).cpu(),
        None if grid.symmetric else zero.to(torch.uint8).cpu(),
        bits=grid.bits,
        group_size=grid.group_size,
    )
    target = W if target is None else target
    norm = float(torch.linalg.vector_norm(target))
    error = float(torch.linalg.vector_norm(int_grouped.dequantize(packed).to(target.device).sub_(target)))
    return packed, error / norm if norm else error

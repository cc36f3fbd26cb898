"""y = x Wᵀ + bias for weights of which a mask of single bits names the kept ones: `prepare` once after loading, then `linear`.

Paths: `cpu`, `dense` and `tiled` (`compress_kernels._sparse`); `reference` defines what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compress_kernels import _sparse
from compress_kernels._sparse import Prepared
from compress_kernels.bitmask import reference, tiled
from compress_kernels.int_grouped_outliers.tiled import starts, tile_rows
from compress_kernels.native import masked

PATHS = _sparse.PATHS


def prepare(
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """Choose a path for a weight of `shape` (O, I), given as the artifact's tensors, and activations of `dtype`.

    Damaged tensors raise a ValueError. `exact` keeps to the reference's weights, rounded to
    the activations' dtype.
    """
    _sparse.refuse(reference.problems(tensors, params, shape), shape)
    mask, offsets, values = tensors["mask"], tensors["row_offsets"], tensors["values"]
    rows = tile_rows(shape, mask.device)
    bounds = starts(offsets, rows)
    decode = tiled.decoder(mask, values, bounds, rows)

    def native() -> masked.Weight:
        return masked.prepare(_sparse.unpack_codes(mask, 1, shape[1]), masked.rounded(values, dtype))

    unable = _sparse.EXACT if exact else None
    return _sparse.choose("bitmask", shape, dtype, rows, decode, (mask, values, bounds), (rows,), native, unable)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    return _sparse.linear(tiled.linear, x, prepared, bias)

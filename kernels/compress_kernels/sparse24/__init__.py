"""y = x Wᵀ + bias for weights of which N of every M consecutive inputs are kept: `prepare` once after loading, then `linear`.

Paths: `cpu`, `dense` and `tiled` (`compress_kernels._sparse`); `reference` defines what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compress_kernels import _sparse
from compress_kernels._sparse import Prepared
from compress_kernels.int_grouped_outliers.tiled import tile_rows
from compress_kernels.native import masked
from compress_kernels.sparse24 import reference, tiled

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
    n, m, values, meta = int(params["n"]), int(params["m"]), tensors["values"], tensors["meta"]
    rows = tile_rows(shape, values.device)

    def native() -> masked.Weight:
        kept = _sparse.flags(_sparse.decode_positions(meta, n, m, shape[1]), n, m, shape[1])
        return masked.prepare(kept, masked.rounded(values.reshape(-1), dtype))

    decode = tiled.decoder(values, meta, n, m)
    unable = _sparse.EXACT if exact else None
    return _sparse.choose("sparse24", shape, dtype, rows, decode, (values, meta), (n, m, rows), native, unable)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    return _sparse.linear(tiled.linear, x, prepared, bias)

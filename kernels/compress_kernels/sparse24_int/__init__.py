"""y = x Wᵀ + bias for grouped integers of which N of every M consecutive inputs are kept: `prepare` once, then `linear`.

Paths: `dense` and `tiled`, chosen by COMPRESS_BACKEND (`compress_kernels._sparse`); `reference` defines what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compress_kernels import _sparse
from compress_kernels._sparse import Prepared
from compress_kernels.int_grouped_outliers.tiled import tile_rows
from compress_kernels.sparse24_int import reference, tiled


def prepare(
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """Choose a path for a weight of `shape` (O, I), given as the artifact's tensors, and activations of `dtype`.

    Damaged tensors raise a ValueError. `exact` changes nothing: both paths equal the reference up to the order of summation.
    """
    _sparse.refuse(reference.problems(tensors, params, shape), shape)
    meta, words, scale = tensors["meta"], tensors["weight_packed"], tensors["weight_scale"]
    parts = tiled.Parts(meta, words, scale, tensors.get("weight_zero_point"))
    bits, n, m = (int(params[key]) for key in ("bits", "n", "m"))
    rows = tile_rows(shape, words.device)
    return _sparse.choose("sparse24_int", shape, dtype, rows, tiled.decoder(parts, bits, n, m), parts, (bits, n, m, rows))


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    return _sparse.linear(tiled.linear, x, prepared, bias)

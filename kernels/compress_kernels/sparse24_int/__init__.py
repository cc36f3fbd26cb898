"""y = x Wᵀ + bias for grouped integers of which N of every M consecutive inputs are kept: `prepare` once, then `linear`.

Paths: `cpu` (4 bits, 2:4 and its like), `dense` and `tiled` (`compress_kernels._sparse`); `reference` defines what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compress_kernels import _sparse
from compress_kernels._sparse import Prepared
from compress_kernels.int_grouped.reference import zeros
from compress_kernels.int_grouped.tiled import decode
from compress_kernels.int_grouped_outliers.tiled import tile_rows
from compress_kernels.native import masked
from compress_kernels.sparse24_int import reference, tiled

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
    meta, words, scale = tensors["meta"], tensors["weight_packed"], tensors["weight_scale"]
    parts = tiled.Parts(meta, words, scale, tensors.get("weight_zero_point"))
    bits, n, m = (int(params[key]) for key in ("bits", "n", "m"))
    rows = tile_rows(shape, words.device)
    inputs, group = shape[1], shape[1] // scale.shape[1]

    def native() -> masked.Weight:
        kept = _sparse.flags(_sparse.decode_positions(meta, n, m, inputs), n, m, inputs)
        q = decode(words, bits, inputs // m * n)
        return masked.prepare_codes(kept, q, scale, None if parts.zero is None else zeros(parts.zero, bits, shape[0]))

    tiles = tiled.decoder(parts, bits, n, m)
    unable = _sparse.EXACT if exact else masked.can_run_codes(bits, n, m, group)
    return _sparse.choose("sparse24_int", shape, dtype, rows, tiles, parts, (bits, n, m, rows), native, unable, bits)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    return _sparse.linear(tiled.linear, x, prepared, bias)

"""y = gamma * B f(A x) + (1 - gamma) * W_s x_I + bias for LOST's layers: `prepare` once after loading, then `linear`.

There is one path, "factors", which is the reference: three products with the factors in the activations' dtype (the stored tensors
themselves where that is theirs). Per token it reads r(O + I) + s·O values, where a dense weight has O·I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress_kernels import _sparse
from compress_kernels.lost import reference


@dataclass(frozen=True, slots=True)
class Prepared:
    """One layer, ready to run."""

    path: str
    tensors: Mapping[str, torch.Tensor]  # A, B, W_s in the activations' dtype, columns int64
    params: Mapping[str, Any]
    spare: bool = True  # the artifact's tensors need not stay in memory


def prepare(
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """A layer of `shape` (O, I), given as the artifact's tensors, for activations of `dtype`.

    Damaged tensors raise a ValueError. `exact` changes nothing: the path is the reference.
    """
    _sparse.refuse(reference.problems(tensors, params, shape), shape)
    ready = {name: tensors[name].to(dtype) for name in ("A", "B", "W_s")}
    return Prepared("factors", {**ready, "columns": tensors["columns"].to(torch.int64)}, dict(params))


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    return reference.linear(x, prepared.tensors, prepared.params, bias)

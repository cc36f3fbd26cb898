"""y = gamma * B f(A x) + (1 - gamma) * W_s x_I + bias for LOST's layers: `prepare` once after loading, then `linear`.

Paths: `cpu`, one call of the C++ library (`lowrank_sparse/cpu.cpp`), and `factors`, which is the reference:
three products with the factors in the activations' dtype. Per token both read r(O + I) + s·O values, where a dense weight has O·I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from compress_kernels import _sparse, backend
from compress_kernels.lost import reference
from compress_kernels.lowrank_sparse import cpu


@dataclass(frozen=True, slots=True)
class Prepared:
    """One layer, ready to run."""

    path: str  # "cpu" or "factors"
    tensors: Mapping[str, torch.Tensor]  # A, B, W_s in the activations' dtype, columns int64; of "cpu" the columns alone
    params: Mapping[str, Any]
    native: cpu.Weight | None = None
    spare: bool = True  # the artifact's tensors need not stay in memory


def prepare(
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """A layer of `shape` (O, I), given as the artifact's tensors, for activations of `dtype`.

    Damaged tensors raise a ValueError. `exact` keeps to the reference, sum by sum.
    """
    _sparse.refuse(reference.problems(tensors, params, shape), shape)
    ready = {name: tensors[name].to(dtype) for name in ("A", "B", "W_s")}
    columns = tensors["columns"].to(torch.int64)
    if exact or backend("cpu", "tiled") == "tiled" or cpu.can_run(dtype, columns.device) is not None:
        return Prepared("factors", {**ready, "columns": columns}, dict(params))
    order = torch.cat([torch.arange(shape[1]), columns]) if len(columns) else None
    U = torch.cat([ready["B"], ready["W_s"]], 1)
    gamma, silu = float(params["gamma"]), params["activation"] == "silu"
    native = cpu.make(shape, order, shape[1], len(columns), ready["A"], U, silu, gamma)
    return Prepared("cpu", {"columns": columns}, dict(params), native)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    w = prepared.native
    if w is None:
        return reference.linear(x, prepared.tensors, prepared.params, bias)
    if cpu.serves(x, w):
        return cpu.linear(x, w, bias)
    assert isinstance(w.A, torch.Tensor)
    assert isinstance(w.U, torch.Tensor)
    gamma, f = float(prepared.params["gamma"]), reference.ACTIVATIONS[prepared.params["activation"]]
    kept = (1 - gamma) * x.index_select(-1, prepared.tensors["columns"])
    return F.linear(torch.cat([gamma * f(F.linear(x, w.A)), kept], -1), w.U, bias)

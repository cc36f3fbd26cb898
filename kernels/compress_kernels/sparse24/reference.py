"""The definition of `sparse24`: the kept values in their places, zeros elsewhere, then `F.linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from compress_kernels import _sparse


def problems(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> list[str]:
    """What is wrong with the tensors of a weight of `shape` (O, I); empty where they can be used."""
    n, m = int(params["n"]), int(params["m"])
    found = _sparse.position_problems(tensors["meta"], n, m, shape)
    if found:
        return found
    values = tensors["values"]
    return _sparse.misshapen("values", values, (shape[0], shape[1] // m * n)) or _sparse.not_finite("values", values)


def dequantize(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight (O, I) in fp32."""
    n, m, values = int(params["n"]), int(params["m"]), tensors["values"]
    out = torch.empty(shape, dtype=torch.float32, device=values.device)
    return _sparse.scatter(values, _sparse.unpack_positions(tensors["meta"], n, m, shape[1]), n, m, out)


def linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias, in x's dtype, to which the values are rounded."""
    return F.linear(x, dequantize(tensors, params, shape).to(x.dtype), bias)

"""The definition of `bitmask`: the kept values where the mask's bits are set, zeros elsewhere, then `F.linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from compress_kernels import _sparse


def kept(mask: torch.Tensor, inputs: int) -> torch.Tensor:
    """(O, I) bool from the mask's bytes (O, ceil(I/8)); bits beyond the last column are not looked at."""
    return _sparse.unpack_codes(mask, 1, inputs).to(torch.bool)


def problems(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> list[str]:
    """What is wrong with the tensors of a weight of `shape` (O, I); empty where they can be used."""
    mask, offsets, values = tensors["mask"], tensors["row_offsets"], tensors["values"]
    O, I = shape
    found = _sparse.misshapen("mask", mask, (O, _sparse.octets(I, 1)))
    found += _sparse.misshapen("row_offsets", offsets, (O + 1,)) + _sparse.misshapen("values", values, (values.numel(),))
    if found:
        return found
    begin, end = int(offsets[0]), int(offsets[-1])
    if begin != 0:
        found.append(f"row_offsets starts at {begin}, not 0")
    if end != len(values):
        found.append(f"row_offsets ends at {end}, there are {len(values)} values")
    saw, want = offsets.to(torch.int64).diff(), kept(mask, I).sum(1, dtype=torch.int32)
    wrong = saw != want
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        found.append(f"row_offsets gives row {row} {int(saw[row])} values, the mask keeps {int(want[row])}")
    return found + _sparse.not_finite("values", values)


def dequantize(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight (O, I) in fp32."""
    values = tensors["values"]
    out = torch.zeros(shape, dtype=torch.float32, device=values.device)
    return out.masked_scatter_(kept(tensors["mask"], shape[1]), values.float())


def linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias, in x's dtype, to which the values are rounded."""
    return F.linear(x, dequantize(tensors, params, shape).to(x.dtype), bias)

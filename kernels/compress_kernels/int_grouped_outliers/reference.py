"""The definition of `int_grouped_outliers`: grouped integers, outliers over them, then `F.linear`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from compress_kernels.int_grouped import reference as int_grouped

ROWS = 16  # output rows of one group that share the second level's offset and step
SCALE_BITS = 3


def scales(codes: torch.Tensor, offset: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Scales (R, G) fp32 from codes (R, G) uint8 and 16-bit offset and step (ceil(R/16), G): offset + code * step.

    The product has at most 14 significant bits, so it is exact in fp32 and only the sum is rounded, fused or not.
    """
    R = codes.shape[0]
    low, width = (t.float().repeat_interleave(ROWS, 0)[:R] for t in (offset, step))
    return low + codes.float() * width


def stored_scales(tensors: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
    """Scales (O, G) of an artifact's tensors: as stored, or fp32 from the second level. `rows` is O."""
    if "weight_scale" in tensors:
        return tensors["weight_scale"]
    codes = int_grouped.zeros(tensors["weight_scale_packed"], SCALE_BITS, rows)
    return scales(codes, tensors["weight_scale_offset"], tensors["weight_scale_step"])


def positions(indptr: torch.Tensor, index: torch.Tensor, inputs: int) -> torch.Tensor:
    """Flat positions (nnz,) int64 in R rows of `inputs` columns, from indptr (R+1,) and the columns (nnz,) of these rows."""
    rows = torch.repeat_interleave(indptr.diff().to(torch.int64), output_size=index.shape[0])
    return rows.mul_(inputs).add_(index.to(torch.int64))


def problems(indptr: torch.Tensor, index: torch.Tensor, value: torch.Tensor, shape: tuple[int, int]) -> list[str]:
    """What is wrong with the outliers of a weight of `shape` (O, I); empty where they can be used."""
    O, I = shape
    if indptr.shape != (O + 1,) or index.ndim != 1 or index.shape != value.shape:
        saw = f"indptr {list(indptr.shape)}, index {list(index.shape)}, value {list(value.shape)}"
        return [f"outliers have {saw}, wanted [{O + 1}] and two equal lengths"]
    found = []
    begin, end, counts = int(indptr[0]), int(indptr[-1]), indptr.to(torch.int64).diff()
    if begin != 0:
        found.append(f"outlier_indptr starts at {begin}, not 0")
    if end != len(index):
        found.append(f"outlier_indptr ends at {end}, there are {len(index)} outliers")
    if bool((counts < 0).any()):
        found.append(f"outlier_indptr falls after row {int((counts < 0).nonzero()[0])}")
    if len(index):
        least, greatest = (int(v) for v in torch.aminmax(index.to(torch.int64)))
        if least < 0 or greatest >= I:
            found.append(f"outlier_index has column {least if least < 0 else greatest}, the weight has {I} inputs")
    if not bool(torch.isfinite(value).all()):
        found.append("outlier_value holds NaN or Inf")
    if found:
        return found
    falls = positions(indptr, index, I).diff() <= 0
    if bool(falls.any()):
        place = falls.nonzero()[0] + 1
        row = int(torch.searchsorted(indptr.to(torch.int64), place, right=True)) - 1
        found.append(f"outlier_index does not ascend in row {row}")
    return found


def dequantize(tensors: Mapping[str, torch.Tensor], bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight (O, I) in fp32: (q - z) * scale, and the outliers' values in their places."""
    scale = stored_scales(tensors, shape[0])
    W = int_grouped.dequantize(tensors["weight_packed"], scale, tensors.get("weight_zero_point"), bits, shape)
    at = positions(tensors["outlier_indptr"], tensors["outlier_index"], shape[1])
    W.view(-1)[at] = tensors["outlier_value"].float()
    return W


def linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    bits: int,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias, in x's dtype: W is dequantized in fp32 and then rounded to that dtype."""
    return F.linear(x, dequantize(tensors, bits, shape).to(x.dtype), bias)

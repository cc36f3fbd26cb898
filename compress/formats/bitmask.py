"""Weights of any sparsity: exact 16-bit values and one bit per weight that says which are kept. Our own loader only.

Layout for W (O, I), nnz kept weights; E is F16 or BF16, the checkpoint's dtype (F16 for F32):

    mask         uint8 (O, ceil(I/8))     1 = kept, LSB first along the row; a row's last bits are 0
    row_offsets  int32 (O + 1)            row o's values are offsets[o] .. offsets[o + 1] - 1; int64 where O * I >= 2^31
    values       E (nnz)                  the kept values, row by row, in the order of their columns

A kept weight may be 0: how many are kept is known before their values are. 9 bits per weight where half of them are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compress_kernels import _sparse
from compress_kernels.bitmask import reference

from compress.formats import int_grouped, int_grouped_outliers, sparse24
from compress.types import Packed, TensorSpec, Trainable

KIND = "bitmask"
VERSION = 1

value_dtype = int_grouped_outliers.value_dtype
bits_per_weight = int_grouped.bits_per_weight


def _wide(shape: tuple[int, int]) -> bool:
    """Whether an offset may not fit int32."""
    return shape[0] * shape[1] >= 1 << 31


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I) of a checkpoint of safetensors dtype `dtype`."""
    return {
        "mask": ("U8", (shape[0], _sparse.octets(shape[1], 1))),
        "row_offsets": ("I64" if _wide(shape) else "I32", (shape[0] + 1,)),
        "values": (value_dtype(dtype), (int(params["nnz"]),)),
    }


def complete(params: Mapping[str, Any], found: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """`params` with what config.json does not hold, from the specs of the tensors found under the linear's name."""
    _, shape = found.get("values", ("F16", (0,)))
    return {**params, "nnz": shape[0] if shape else 0}


def pack(W: torch.Tensor, mask: torch.Tensor) -> Packed:
    """Pack W (O, I), 16-bit or, on the way to a dense export, fp32, by a mask (O, I) bool; a kept weight may be 0.

    A negative zero is stored as zero.

    A weight outside the mask that is not zero raises: nothing is dropped.
    """
    assert W.dtype in (torch.float16, torch.bfloat16, torch.float32), "values are 16-bit; 32-bit ones are never written"
    shape = (int(W.shape[0]), int(W.shape[1]))
    sparse24.uncovered(W, mask)
    values = W.masked_select(mask) + 0.0  # -0.0 + 0.0 is 0.0
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int64 if _wide(shape) else torch.int32, device=W.device)
    offsets[1:] = mask.sum(1, dtype=torch.int32).cumsum(0)
    tensors = {"mask": _sparse.pack_codes(mask, 1), "row_offsets": offsets, "values": values}
    return Packed(KIND, VERSION, {"nnz": len(values)}, tensors, shape)


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept values (nnz,) and the mask (O, I) bool: exactly what was packed."""
    return packed.tensors["values"], reference.kept(packed.tensors["mask"], packed.shape[1])


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I) in fp32."""
    return reference.dequantize(packed.tensors, packed.params, packed.shape)


def trainable(packed: Packed) -> Trainable:
    """The kept values may change, the mask may not."""
    values, mask = unpack(packed)
    dtype = values.dtype
    return Trainable(
        {"W": dequantize(packed)},
        lambda parts: parts["W"] * mask.to(parts["W"].device),
        lambda parts: pack((parts["W"].cpu() * mask).to(dtype), mask),
    )  # fmt: skip


def problems(packed: Packed) -> list[str]:
    """What is wrong with the tensors; empty where they can be used. `unpack` and `dequantize` do not look."""
    return reference.problems(packed.tensors, packed.params, packed.shape)

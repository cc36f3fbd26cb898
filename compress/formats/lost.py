"""LOST's layers (arXiv 2508.02668): low rank with SiLU between the factors, and a few dense input columns. Our own loader only.

    y = gamma * B f(A x) + (1 - gamma) * W_s x_I + bias

Layout for a linear (O, I), params `rank` r, `kept` s, `gamma` and `activation` ("silu", or "identity" for none); E is F16 or BF16,
the checkpoint's dtype (F16 for F32):

    B        E (O, r)
    A        E (r, I)
    columns  uint16 (s), int32 where I > 65536    the inputs I that W_s reads, ascending
    W_s      E (O, s)

gamma = 1 and s = 0 is a low-rank layer with SiLU (CoLA's). Under SiLU no weight does the same: such an artifact is run, never
converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compress_kernels.lost import reference

from compress.errors import CompressError
from compress.formats import int_grouped, int_grouped_outliers
from compress.types import Packed, TensorSpec

KIND = "lost"
VERSION = 1

value_dtype = int_grouped_outliers.value_dtype
bits_per_weight = int_grouped.bits_per_weight


def _check(params: Mapping[str, Any], shape: tuple[int, int]) -> None:
    why = reference.unfit(params, shape)
    if why is not None:
        raise CompressError(why, hint="use another rank, or leave this linear dense", usage=True)


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I) of a checkpoint of safetensors dtype `dtype`."""
    _check(params, shape)
    E, index = value_dtype(dtype), "U16" if shape[1] <= 1 << 16 else "I32"
    return {name: (index if name == "columns" else E, size) for name, size in reference.shapes(params, shape).items()}


def pack(
    A: torch.Tensor, B: torch.Tensor, columns: torch.Tensor, W_s: torch.Tensor, *, gamma: float, activation: str = "silu"
) -> Packed:
    """Pack A (r, I), B (O, r) and W_s (O, s), all of E, and columns (s,), ascending; -0.0 is stored as 0.0."""
    shape = (int(B.shape[0]), int(A.shape[1]))
    params = {"rank": int(A.shape[0]), "kept": len(columns), "gamma": float(gamma), "activation": activation}
    _check(params, shape)
    assert A.dtype == B.dtype == W_s.dtype, "factors have one dtype"
    assert A.dtype in (torch.float16, torch.bfloat16), "factors are 16-bit"
    index = columns.to(torch.uint16 if shape[1] <= 1 << 16 else torch.int32)
    tensors = {"B": B + 0.0, "A": A + 0.0, "columns": index, "W_s": W_s + 0.0}
    packed = Packed(KIND, VERSION, params, {name: t.contiguous() for name, t in tensors.items()}, shape)
    broken = problems(packed)
    if broken:
        raise CompressError(broken[0], hint="train with a smaller learning rate, or store bfloat16")
    return packed


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B, columns (int64) and W_s: exactly what was packed."""
    t = packed.tensors
    return t["A"], t["B"], t["columns"].to(torch.int64), t["W_s"]


def without_weight(params: Mapping[str, Any]) -> str | None:
    """None, or why a layer with these params stands for no dense weight."""
    return None if params["activation"] == "identity" else f"{params['activation']} stands between its factors"


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I) in fp32; a layer with an activation has none, and raises."""
    why = without_weight(packed.params)
    if why is not None:
        raise CompressError(f"a lost layer has no dense weight: {why}", hint="start from a dense checkpoint")
    return reference.weight(packed.tensors, packed.params)


def problems(packed: Packed) -> list[str]:
    """What is wrong with the tensors; empty where they can be used. `unpack` and `dequantize` do not look."""
    return reference.problems(packed.tensors, packed.params, packed.shape)

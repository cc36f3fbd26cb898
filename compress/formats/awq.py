"""4-bit groups, written as AutoAWQ "gemm": an export for vLLM, converted to `int_grouped` when loaded here.

Layout (casper-hansen/AutoAWQ `awq/modules/linear/gemm.py`, `awq/utils/packing_utils.py`), W (O, I), G = I / group_size:

    qweight   int32 (I, O/8)    unsigned codes, packed along the output
    qzeros    int32 (G, O/8)    unsigned zeros, the same order; 8 everywhere where symmetric
    scales    fp16  (G, O)

    W = (q - z) * scale; nibble i of word c holds output 8c + ORDER[i].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compress_kernels import bits as bitpack

from compress.errors import CompressError
from compress.formats import int_grouped
from compress.types import Packed, TensorSpec

KIND = "awq"
VERSION = 1
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def _check(bits: int, rows: int) -> None:
    if bits != 4:
        raise CompressError(f"AWQ's gemm layout has 4 bits, not {bits}", hint="use --format pack-quantized", usage=True)
    if rows % 8:
        raise CompressError(
            f"AWQ's gemm layout needs outputs divisible by 8, not {rows}",
            hint="use --format pack-quantized, or --ignore this linear",
            usage=True,
        )


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I); scales are F16 whatever `dtype` says."""
    O, I = shape
    _check(int(params["bits"]), O)
    G = int_grouped.groups(params, shape)
    return {"qweight": ("I32", (I, O // 8)), "qzeros": ("I32", (G, O // 8)), "scales": ("F16", (G, O))}


def _interleave(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Reorder each run of 8 columns of codes (R, O)."""
    return codes.unflatten(1, (-1, 8))[:, :, list(order)].flatten(1)


def pack(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, *, bits: int, group_size: int) -> Packed:
    """Pack codes q (O, I) uint8, scale (O, G), rounded to fp16, and zero (O, G) uint8 (None: symmetric)."""
    O, I = int(q.shape[0]), int(q.shape[1])
    _check(bits, O)
    half = scale.T.to(torch.float16).contiguous()
    if not torch.isfinite(half).all():
        raise CompressError("a scale exceeds fp16, which AWQ's gemm layout stores", hint="use --format pack-quantized")
    if zero is None:
        zero = torch.full(scale.shape, 8, dtype=torch.uint8)
    tensors = {
        "qweight": bitpack.pack(_interleave(q.T, ORDER), 4),
        "qzeros": bitpack.pack(_interleave(zero.T, ORDER), 4),
        "scales": half,
    }
    return Packed(KIND, VERSION, {"bits": 4, "group_size": group_size, "symmetric": False}, tensors, (O, I))


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (O, I) uint8, scale (O, G) fp16 and zero (O, G) uint8: exactly what was packed."""
    O = packed.shape[0]
    codes = (bitpack.unpack(packed.tensors[name], 4, O) for name in ("qweight", "qzeros"))
    q, zero = (_interleave(c, _INVERSE).T.contiguous() for c in codes)
    return q, packed.tensors["scales"].T.contiguous(), zero


def from_int_grouped(packed: Packed, params: Mapping[str, Any]) -> Packed:
    """The same weight in the gemm layout, its scales rounded to fp16."""
    return pack(*int_grouped.unpack(packed), bits=int(params["bits"]), group_size=int(params["group_size"]))


def to_int_grouped(packed: Packed) -> Packed:
    """The same weight, value for value, as `int_grouped`."""
    return int_grouped.pack(*unpack(packed), bits=4, group_size=int(packed.params["group_size"]))


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I) in fp32: (q - z) * scale."""
    return int_grouped.dequantize(to_int_grouped(packed))


bits_per_weight = int_grouped.bits_per_weight

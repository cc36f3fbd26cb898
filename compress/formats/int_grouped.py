"""Grouped integers, written as compressed-tensors `pack-quantized`: loads in stock transformers.

Layout (compressed-tensors `pack_quantized.py`, dense packing of >= 0.19), for W (O, I), `bits` b, G = I / group_size:

    weight_packed      int32 (O, ceil(I*b/32))     unsigned codes q in 0..2^b-1, LSB first along the input
    weight_scale       float (O, G)                 the checkpoint's dtype; codes were computed with this rounded value
    weight_shape       int64 (2,)                   O, I
    weight_zero_point  int32 (ceil(O*b/32), G)      unsigned zeros, packed along the output rows; asymmetric only

    W = (q - z) * scale, z = 2^(b-1) where symmetric.

compressed-tensors reads the same words as signed codes with an offset of 2^(b-1) on both q and z: the bytes agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compress_kernels import bits as bitpack

from compress.types import Packed, TensorSpec

KIND = "int_grouped"
VERSION = 1


def groups(params: Mapping[str, Any], shape: tuple[int, int]) -> int:
    """Number of scale groups per row."""
    size = int(params["group_size"])
    return 1 if size == -1 else shape[1] // size


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I) whose scales have safetensors dtype `dtype`."""
    O, I = shape
    b, G = int(params["bits"]), groups(params, shape)
    out: dict[str, TensorSpec] = {
        "weight_packed": ("I32", (O, bitpack.words(I, b))),
        "weight_scale": (dtype, (O, G)),
        "weight_shape": ("I64", (2,)),
    }
    if not params["symmetric"]:
        out["weight_zero_point"] = ("I32", (bitpack.words(O, b), G))
    return out


def pack(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, *, bits: int, group_size: int) -> Packed:
    """Pack codes q (O, I) uint8, scale (O, G) and zero (O, G) uint8 (None: symmetric)."""
    shape = (int(q.shape[0]), int(q.shape[1]))
    tensors = {
        "weight_packed": bitpack.pack(q, bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
    if zero is not None:
        tensors["weight_zero_point"] = bitpack.pack(zero.T, bits).T.contiguous()
    params = {"bits": bits, "group_size": group_size, "symmetric": zero is None}
    return Packed(KIND, VERSION, params, tensors, shape)


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes (O, I) uint8, scale (O, G), zero (O, G) uint8 or None: exactly what was packed."""
    O, I = packed.shape
    b = int(packed.params["bits"])
    q = bitpack.unpack(packed.tensors["weight_packed"], b, I)
    zero = None
    if "weight_zero_point" in packed.tensors:
        zero = bitpack.unpack(packed.tensors["weight_zero_point"].T.contiguous(), b, O).T.contiguous()
    return q, packed.tensors["weight_scale"], zero


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I) in fp32: (q - z) * scale."""
    q, scale, zero = unpack(packed)
    O, I = packed.shape
    G = scale.shape[1]
    middle = float(1 << (int(packed.params["bits"]) - 1))
    z = torch.full_like(scale, middle, dtype=torch.float32) if zero is None else zero.float()
    W = q.view(O, G, I // G).to(torch.float32)
    return W.sub_(z.unsqueeze(-1)).mul_(scale.float().unsqueeze(-1)).view(O, I)


def bits_per_weight(packed: Packed) -> float:
    """Stored bits per weight, scales, zeros and padding included."""
    total = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    return 8.0 * total / (packed.shape[0] * packed.shape[1])

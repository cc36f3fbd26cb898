"""torch's own CPU kernel for 4-bit weights and bf16 activations (`aten::_weight_int4pack_mm_for_cpu`).

It computes with W = (q - 8) * s + z', s and z' = (8 - z) * s in bf16, so it is close to the reference (about 0.2 % of
the output's norm), not equal. Its weight layout differs between instruction sets: packed at load, never stored. The
aten op has a meta kernel of its own, so `torch.compile` sees through it.
"""

from __future__ import annotations

import torch

from compress_kernels import bits as bitpack

_ROWS = 1024  # rows repacked at a time; a multiple of every block height that torch packs with
ROWS_OF_X = 48  # from more tokens on, decoding tiles for the bf16 BLAS is faster (measured, kernels/README.md)


def can_run(bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason why this path cannot serve a weight of `shape` (O, I) and activations of `dtype`."""
    O, I = shape
    if device.type != "cpu":
        return f"the weight is on {device.type}, int4pack is a CPU kernel"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        return f"int4pack is slow on this CPU ({torch.backends.cpu.get_cpu_capability()})"
    if dtype != torch.bfloat16:
        return f"activations are {str(dtype).removeprefix('torch.')}, int4pack is fast with bfloat16 only"
    if bits != 4:
        return f"{bits} bits, int4pack has 4"
    if group_size not in (32, 64, 128, 256):
        return f"groups of {group_size}, int4pack has 32, 64, 128 and 256"
    if O % 16 or I % 2:
        return f"shape {O} x {I}, int4pack needs outputs divisible by 16 and inputs by 2"
    return None


def prepare(
    words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's weight (O, I/2) uint8 and scales and zeros (G, O, 2) bf16."""
    pieces = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(bitpack.unpack(w, 4, shape[1]).to(torch.int32), 2)
        for w in words.split(_ROWS)
    ]
    s = scale.float()
    z = torch.zeros_like(s) if zero is None else (8.0 - zero.float()) * s
    return torch.cat(pieces), torch.stack((s.T, z.T), dim=-1).to(torch.bfloat16).contiguous()


def linear(
    x: torch.Tensor, weight: torch.Tensor, scales_zeros: torch.Tensor, group_size: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (..., I) bf16 times Wᵀ plus bias -> (..., O)."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight, group_size, scales_zeros)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias

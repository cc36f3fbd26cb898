"""Orthogonal transforms of activations, x H / sqrt(n), for rotations that cannot be folded into a weight (before down_proj).

H is a small Hadamard matrix times Sylvester's: orders 2^k, and k times a base that `matrices.base` has (12, 20, 28, 172 …). On a
GPU one launch takes a row per program, with silu(gate) · up before it where asked for; else the reference runs, two or three
small products.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import torch

from compress_kernels.hadamard import reference
from compress_kernels.int_grouped import triton as int_grouped

_MOST = 1 << 14  # padded elements of a row that one program holds
_SMALLEST = 16  # inner dimension of a dot


@functools.cache
def _device_code() -> ModuleType:
    from compress_kernels.hadamard import device

    return device


def sides(left: int) -> tuple[int, int]:
    """Sylvester's order as B · C, the larger one C; B is 1 or, as a dot's inner dimension must be, at least 16."""
    bits = left.bit_length() - 1
    if left <= 128:
        return 1, left
    return 1 << bits // 2, 1 << (bits - bits // 2)


def can_run(n: int, base: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason why the GPU's kernel cannot transform rows of `n` elements."""
    why = int_grouped.can_run(4, 32, (n, 32), dtype, device)
    if why is not None:
        return why
    B, C = sides(reference.power(n, base))
    order = 1 if base is None else base.shape[0]
    if C < _SMALLEST:
        return f"a power of two of {B * C}, triton needs {_SMALLEST}"
    padded = 1 << (order - 1).bit_length()
    size = padded * B * C
    if (size > 8192 or padded > 128) and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{n} elements by {order}, {B} and {C} spill before compute capability 9.0"
    if size > _MOST or max(padded, B, C) > 256:
        return f"{n} elements, triton's program holds {_MOST}"
    return None


def warps(padded: int, size: int) -> int:
    """Warps of a program: as many as keep its `size` elements in registers, base of order `padded`."""
    return 8 if padded > 128 else 16 if size > 8192 else 8 if size > 4096 else 4


def transform(x: torch.Tensor, base: torch.Tensor | None = None, up: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., n) -> x H / sqrt(n) in its dtype; base (k, k) of ±1 in any dtype, on x's device; up: silu(x) · up is transformed.

    Raises ValueError where n is not the base's order times a power of two.
    """
    return _op(x, base, up) if torch.compiler.is_compiling() else _transform(x, base, up)


def _transform(x: torch.Tensor, base: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor:
    if can_run(x.shape[-1], base, x.dtype, x.device) is not None:
        return reference.transform(x, base, up)
    return _run(x, base, up)


def _run(x: torch.Tensor, base: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor:
    n = x.shape[-1]
    flat, gate = (None if t is None else _rows(t, n) for t in (x, up))
    assert flat is not None
    B, C = sides(reference.power(n, base))
    A = 1 if base is None else base.shape[0]
    y = flat.new_empty(flat.shape)
    if len(flat):
        upcast = x.dtype == torch.float32 or (int_grouped.interpreted() and x.dtype == torch.bfloat16)
        AP = 1 << (A - 1).bit_length()
        size = AP * B * C
        code: Any = _device_code()
        code.transform[(len(flat),)](
            flat, flat if gate is None else gate, flat if base is None else base.contiguous(), y, flat.stride(0),
            0 if gate is None else gate.stride(0), n, 1 / math.sqrt(A if A > 1 else B if B > 1 else C),
            1 / math.sqrt(C), 1 / math.sqrt(B if B > 1 else C),
            A=A, AP=AP, B=B, C=C, GATED=gate is not None, UPCAST=upcast,
            num_warps=warps(AP, size),
        )  # fmt: skip
    return y.view(x.shape)


def _rows(t: torch.Tensor, n: int) -> torch.Tensor:
    flat = t.reshape(-1, n)
    return flat if flat.stride(1) == 1 else flat.contiguous()


@torch.library.custom_op("compress_kernels::hadamard", mutates_args=())
def _op(x: torch.Tensor, base: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor:
    return _transform(x, base, up)


@_op.register_fake
def _(x: torch.Tensor, base: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)

"""Our own CPU kernel for one base and many tasks' masked deltas (`cpu.cpp`): base, shared vector and bits are read where they lie.

Nothing is repacked, so a job is made for every call; one pass serves all tasks of a batch. A task's weight is merged piece by
piece, in the nearest cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from compress_kernels import native
from compress_kernels.masked_delta.reference import Delta, Shared

_MISSING = native.missing()  # asked for here, as torch.compile cannot look for files
_CODES = {8: 1, 4: 2}  # bits -> kind in native/jobs.h


def can_run(x: torch.Tensor, W0: torch.Tensor, bias: torch.Tensor | None, shared: Shared) -> str | None:
    """None, or the reason why the library cannot serve a base W0 (O, I), its bias and a shared vector."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, cpu is a CPU kernel"
    if _MISSING is not None:
        return f"the C++ library cannot be used: {_MISSING}"
    if x.dtype not in native.TYPES:
        return f"activations are {str(x.dtype).removeprefix('torch.')}, cpu has float32, bfloat16 and float16"
    if W0.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "base and activations are of different dtypes"
    if torch.is_grad_enabled() and (x.requires_grad or W0.requires_grad):
        return "gradients are asked for"
    for s in (shared, shared.low):
        if s is not None and s.scale is not None and (s.bits not in _CODES or s.zero not in (0, 1 << (s.bits - 1))):
            return f"codes of {s.bits} bits less {s.zero}; cpu has 8 and 4 bits, less half of the codes or nothing"
    parts = [W0, shared.values] + ([] if shared.low is None else [shared.low.values])
    return None if all(t.is_contiguous() for t in parts) else "base or shared vector is not contiguous"


def linear(
    x: torch.Tensor, W0: torch.Tensor, bias: torch.Tensor | None, shared: Shared, deltas: Mapping[str, Delta], are_signs: bool,
    tasks: Sequence[str | None],
) -> torch.Tensor:  # fmt: skip
    """As `reference.linear`, of which at least one row has a delta."""
    names = [t for t in dict.fromkeys(tasks) if t in deltas]
    number = {t: i for i, t in enumerate(names)}
    each = x.numel() // x.shape[-1] // len(tasks)  # rows of a task's run
    rows = [number.get(t, -1) for t in tasks for _ in range(each)]
    found = [deltas[t] for t in names if t is not None]
    low = shared.low or Shared(shared.values[:0])
    parts = shared.values, shared.scale, shared.bits, shared.zero, low.values, low.scale, low.bits, low.zero, shared.low is not None
    run = _op if torch.compiler.is_compiling() else _product
    return run(x, W0, bias, *parts, [d.mask for d in found], [d.scale for d in found], rows, are_signs)  # type: ignore[no-any-return]


def shared_vector(shared: Shared, inputs: int) -> native.Shared:
    """A shared vector of rows of so many numbers as the library takes it, without its `low`."""
    return _shared(shared.values, shared.scale, shared.bits, shared.zero, inputs)


def _shared(values: torch.Tensor, scale: torch.Tensor | None, bits: int, zero: int, inputs: int) -> native.Shared:
    if values.dim() == 1:
        return native.Shared(3, 0, inputs, values.data_ptr(), None)
    if scale is None:
        return native.Shared(0, 0, inputs, values.data_ptr(), None)
    return native.Shared(_CODES[bits], zero, inputs // scale.shape[1], values.data_ptr(), scale.data_ptr())


def _product(
    x: torch.Tensor, W0: torch.Tensor, bias: torch.Tensor | None, values: torch.Tensor, scale: torch.Tensor | None, bits: int,
    zero: int, low: torch.Tensor, low_scale: torch.Tensor | None, low_bits: int, low_zero: int, has_low: bool,
    masks: list[torch.Tensor], factors: list[float], rows: list[int], signs: bool,
) -> torch.Tensor:  # fmt: skip
    O, I = W0.shape
    n = len(masks)
    job = native.MaskedDelta(
        I, O, int(signs), int(has_low), W0.data_ptr(), native.pointer(bias), _shared(values, scale, bits, zero, I),
        _shared(low, low_scale, low_bits, low_zero, I) if has_low else native.Shared(), n,
        (ctypes.c_void_p * n)(*(m.data_ptr() for m in masks)), (ctypes.c_float * n)(*factors), (ctypes.c_int32 * len(rows))(*rows),
    )  # fmt: skip
    stride = -(-I // 32) * 32 + 32
    return native.product("cc_masked_delta", job, x, I, O, lambda M: 8 * M + 64 + 4 * M * stride)


@torch.library.custom_op("compress_kernels::masked_delta_cpu", mutates_args=())
def _op(
    x: torch.Tensor, W0: torch.Tensor, bias: torch.Tensor | None, values: torch.Tensor, scale: torch.Tensor | None, bits: int,
    zero: int, low: torch.Tensor, low_scale: torch.Tensor | None, low_bits: int, low_zero: int, has_low: bool,
    masks: list[torch.Tensor], factors: list[float], rows: list[int], signs: bool,
) -> torch.Tensor:  # fmt: skip
    return _product(
        x, W0, bias, values, scale, bits, zero, low, low_scale, low_bits, low_zero, has_low, masks, factors, rows, signs
    )  # fmt: skip


@_op.register_fake
def _(
    x: torch.Tensor, W0: torch.Tensor, bias: torch.Tensor | None, values: torch.Tensor, scale: torch.Tensor | None, bits: int,
    zero: int, low: torch.Tensor, low_scale: torch.Tensor | None, low_bits: int, low_zero: int, has_low: bool,
    masks: list[torch.Tensor], factors: list[float], rows: list[int], signs: bool,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], W0.shape[0])

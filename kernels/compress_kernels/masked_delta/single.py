"""A base weight and one task's masked delta, as `compress_kernels.block` runs them: `cpu.cpp` on one task for all rows of x."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch

from compress_kernels import native
from compress_kernels.masked_delta import cpu, reference
from compress_kernels.masked_delta.reference import Delta, Shared

_ROWS = 64  # of x, at most


@dataclass(frozen=True)
class Weight:
    """W0 + s d (O, I), W0 of the activations' dtype; its parts are read where they lie."""

    base: torch.Tensor
    shared: Shared
    delta: Delta
    are_signs: bool
    job: Any = field(default=None, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.base.shape[0], self.base.shape[1]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has tensors, and so pointers, of its own."""
        return make, (self.base, self.shared, self.delta, self.are_signs)


def can_run(base: torch.Tensor, shared: Shared, dtype: torch.dtype) -> str | None:
    """None, or the reason why the library cannot serve these and activations of `dtype`."""
    with torch.no_grad():
        return cpu.can_run(torch.empty(0, dtype=dtype), base, None, shared)


def make(base: torch.Tensor, shared: Shared, delta: Delta, are_signs: bool) -> Weight:
    """A weight of tensors for which `can_run` has said None."""
    O, I = base.shape
    low = native.Shared() if shared.low is None else cpu.shared_vector(shared.low, I)
    job = native.MaskedDelta(
        I, O, int(are_signs), int(shared.low is not None), base.data_ptr(), None, cpu.shared_vector(shared, I), low, 1,
        (ctypes.c_void_p * 1)(delta.mask.data_ptr()), (ctypes.c_float * 1)(delta.scale), (ctypes.c_int32 * _ROWS)(),
    )  # fmt: skip
    return Weight(base, shared, delta, are_signs, job)


def linear(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """x (B, I) -> (B, O) in x's dtype, by the definition."""
    return reference.linear(x, w.base, None, w.shared, {"": w.delta}, w.are_signs, [""])

"""Our own CPU kernel for thin factors and kept columns (`cpu.cpp`): kinds `lowrank_sparse` and `lost`.

One call gathers x's columns, multiplies with A, and then with U = [B | W_s]. Plain factors are read as they lie; coded ones are
`int_grouped` weights in the kernel's layout.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch

from compress_kernels import native
from compress_kernels.int_grouped import cpu as int_grouped

ROWS_OF_X = 48  # from more rows on, the BLAS multiplies plain factors


@dataclass(frozen=True)
class Weight:
    """A weight (O, I) ready for the library."""

    shape: tuple[int, int]
    order: torch.Tensor | None  # (first + last,) int32 columns of x
    A: torch.Tensor | int_grouped.Weight | None  # (rank, first)
    U: torch.Tensor | int_grouped.Weight  # (O, rank + last)
    silu: bool
    gamma: float | None  # of `lost`: A's part is multiplied by it, the columns' by 1 - gamma
    job: Any = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has tensors, and so pointers, of its own."""
        return make, (self.shape, self.order, self.job.first, self.job.last, self.A, self.U, self.silu, self.gamma)


def can_run(dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason why the library cannot serve factors on `device` and activations of `dtype`."""
    if device.type != "cpu":
        return f"the factors are on {device.type}, cpu is a CPU kernel"
    if dtype not in native.TYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, cpu has float32, bfloat16 and float16"
    why = native.missing()
    return None if why is None else f"the C++ library cannot be used: {why}"


def make(
    shape: tuple[int, int], order: torch.Tensor | None, first: int, last: int, A: torch.Tensor | int_grouped.Weight | None,
    U: torch.Tensor | int_grouped.Weight, silu: bool = False, gamma: float | None = None,
) -> Weight:  # fmt: skip
    """A weight (O, I) of A (rank, first) and U (O, rank + last); `order` names x's columns for both, None: the first ones."""
    order = None if order is None else order.to(torch.int32)
    A, U = (W.contiguous() if isinstance(W, torch.Tensor) else W for W in (A, U))
    assert U is not None
    rank = 0 if A is None else _size(A)[0]
    plain = [W.data_ptr() if isinstance(W, torch.Tensor) else None for W in (A, U)]
    coded = [ctypes.pointer(W.job) if isinstance(W, int_grouped.Weight) else None for W in (A, U)]
    job = native.Factors(
        shape[1], shape[0], rank, first if rank else 0, last, 0 if A is None else _size(A)[1], _size(U)[1], native.pointer(order),
        *plain, *coded, int(silu), int(gamma is not None), gamma or 0.0, 1 - (gamma or 0.0),
    )  # fmt: skip
    return Weight(shape, order, A, U, silu, gamma, job)


def serves(x: torch.Tensor, w: Weight) -> bool:
    """Whether this path is the fastest for as many rows of x."""
    if isinstance(w.U, int_grouped.Weight):
        few = not w.U.exact or x.numel() <= int_grouped.ROWS_EXACT * x.shape[-1]
        return few and not torch.compiler.is_compiling()
    return x.numel() <= ROWS_OF_X * x.shape[-1]


def _size(W: torch.Tensor | int_grouped.Weight) -> tuple[int, int]:
    return W.shape[0], W.shape[1]


def linear(x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    if torch.compiler.is_compiling() and isinstance(w.U, torch.Tensor) and not isinstance(w.A, int_grouped.Weight):
        y = _op(x, w.order, w.A, w.U, w.job.first, w.job.last, w.silu, w.gamma)
    else:
        y = _product(x, w)
    return y if bias is None else y + bias


def _product(x: torch.Tensor, w: Weight) -> torch.Tensor:
    job = w.job

    def space(M: int) -> int:
        own = max((int_grouped.workspace(W.job, M) for W in (w.A, w.U) if isinstance(W, int_grouped.Weight)), default=0)
        return 4 * M * (job.padded + job.joined + job.rank) + own + 4 * 64

    return native.product("cc_factors", job, x, w.shape[1], w.shape[0], space)


@torch.library.custom_op("compress_kernels::factors_cpu", mutates_args=())
def _op(
    x: torch.Tensor, order: torch.Tensor | None, A: torch.Tensor | None, U: torch.Tensor, first: int, last: int, silu: bool,
    gamma: float | None,
) -> torch.Tensor:  # fmt: skip
    return _product(x, make((U.shape[0], x.shape[-1]), order, first, last, A, U, silu, gamma))


@_op.register_fake
def _(
    x: torch.Tensor, order: torch.Tensor | None, A: torch.Tensor | None, U: torch.Tensor, first: int, last: int, silu: bool,
    gamma: float | None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], U.shape[0])

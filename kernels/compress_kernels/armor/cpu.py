"""Our own CPU kernel for ARMOR's weights (`cpu.cpp`): both block diagonals and the sparse core in one call, for few rows of x."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch

from compress_kernels import native
from compress_kernels.native import masked


@dataclass(frozen=True)
class Weight:
    """A weight ready to run."""

    pre: torch.Tensor  # (I/b, b, b), of the activations' dtype
    post: torch.Tensor  # (O/b, b, b)
    core: masked.Weight
    job: Any = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has tensors, and so pointers, of its own."""
        return make, (self.pre, self.post, self.core)


def make(pre: torch.Tensor, post: torch.Tensor, core: masked.Weight) -> Weight:
    """A weight of block diagonals of the activations' dtype and a core in the kernel's layout."""
    pre, post = pre.contiguous(), post.contiguous()
    job = native.Armor(pre.shape[1], post.shape[1], pre.data_ptr(), post.data_ptr(), ctypes.pointer(core.job))
    return Weight(pre, post, core, job)


def linear(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    if torch.compiler.is_compiling():
        c = w.core
        return _op(x, w.pre, w.post, c.mask, c.start, c.values, c.scale, c.zero, c.group_size)  # type: ignore[no-any-return]
    return _product(x, w)


def _product(x: torch.Tensor, w: Weight) -> torch.Tensor:
    O, I = w.core.shape
    size, stride = x.element_size(), -(-max(I, O) // 32) * 32 + 32
    return native.product("cc_armor", w.job, x, I, O, lambda M: M * size * (I + O) + 4 * (M + 16) * stride + 128)


@torch.library.custom_op("compress_kernels::armor_cpu", mutates_args=())
def _op(
    x: torch.Tensor, pre: torch.Tensor, post: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, values: torch.Tensor,
    scale: torch.Tensor | None, zero: torch.Tensor | None, group_size: int,
) -> torch.Tensor:  # fmt: skip
    shape = post.shape[0] * post.shape[1], x.shape[-1]
    core = masked.make(mask, start, values, scale, zero, shape, group_size)
    return _product(x, make(pre, post, core))


@_op.register_fake
def _(
    x: torch.Tensor, pre: torch.Tensor, post: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, values: torch.Tensor,
    scale: torch.Tensor | None, zero: torch.Tensor | None, group_size: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], post.shape[0] * post.shape[1])

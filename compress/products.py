"""Faster fp32 products on AMD CPUs, where MKL, the BLAS that torch's x86 builds are linked to, keeps to its slow paths.

oneDNN, which every such build contains too, is two to three times faster there at the same precision (docs/log.md). `faster` sends
linear layers and products with a matrix to it, nothing else, and only on such machines: the choice depends on hardware and software
alone, so equal jobs still give equal bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LEAST = 1 << 20  # multiply-adds from which on the detour pays
_ROOM = 4 << 20  # numbers of a product that is added to something


@functools.cache
def pays() -> bool:
    """Whether this machine and this torch are such that oneDNN is faster."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _plain(*tensors: object) -> bool:
    """Whether all are dense fp32 tensors on the CPU, of no subclass."""
    return all(
        isinstance(t, torch.Tensor) and type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype == torch.float32
        and t.device.type == "cpu" and t.layout == torch.strided
        for t in tensors
    )  # fmt: skip


def _product(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ, W (O, I), plus bias. Slices are copied: oneDNN multiplies some strides a hundred times slower."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), W.contiguous(), bias, "none", [], "")
    return y


class _Linear(torch.autograd.Function):
    """The same with gradients, for the reverse walk and for recovery."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, W)
        return _product(x, W, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # type: ignore[override]
        x, W = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = _product(dy.contiguous(), W.T) if ctx.needs_input_grad[0] else None
        dW = _product(rows.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None
        return dx, dW, rows.sum(0) if ctx.needs_input_grad[2] else None


def _linear(x: Any, W: Any, bias: Any = None) -> Any:
    if not (_plain(x, W) and W.dim() == 2 and x.dim() > 1 and x.numel() * len(W) >= _LEAST and (bias is None or _plain(bias))):
        return NotImplemented
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, W, bias)):
        return _Linear.apply(x, W, bias)  # type: ignore[no-untyped-call]
    return _product(x, W, bias)


def _matmul(A: Any, B: Any) -> Any:
    if not (_plain(A, B) and B.dim() == 2 and A.dim() > 1 and A.numel() * B.shape[1] >= _LEAST) or _wants_gradient(A, B):
        return NotImplemented
    return _product(A, B.T)


def _addmm_(C: Any, A: Any, B: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """C += alpha A B, some rows at a time, so that their product takes little room."""
    if beta != 1 or not _plain(C, A, B) or A.numel() * B.shape[1] < _LEAST or _wants_gradient(C, A, B):
        return NotImplemented
    step = max(1, _ROOM // C.shape[1])
    for row in range(0, len(C), step):
        C[row : row + step].add_(_product(A[row : row + step], B.T), alpha=alpha)
    return C


def _wants_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: _linear,
    torch.Tensor.addmm_: _addmm_,
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__), _matmul),
}


class _Products(TorchFunctionMode):
    """Linear layers, and products whose right factor is a matrix."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        instead = _INSTEAD.get(func)
        found = NotImplemented if instead is None else instead(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


@contextmanager
def faster() -> Iterator[None]:
    """Send products to oneDNN while this is open, where that pays."""
    if not pays():
        yield
        return
    with _Products():
        yield

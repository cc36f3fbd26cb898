"""`CompressedLinear` stands where a linear stood: it holds the artifact's tensors and runs a kernel on them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from compress_kernels import BackendError
from torch import nn

from compress import registry
from compress.checkpoint import dtypes
from compress.errors import CompressError
from compress.types import Packed


class CompressedLinear(nn.Module):
    """y = x Wᵀ + bias for a weight (O, I) stored in a format's tensors, which are this module's buffers.

    Buffers carry the format's names (`weight_packed`, `weight_scale`, …), so state-dict names equal those on disk. They
    keep their stored dtypes through `.to(dtype)`: only the arithmetic's dtype changes, never the weight's values.
    There is no `weight` parameter; `dense_weight()` makes one.
    """

    def __init__(
        self,
        kind: str,
        params: Mapping[str, Any],
        shape: tuple[int, int],
        *,
        stored: str,
        dtype: torch.dtype,
        bias: bool = False,
        device: str | torch.device = "meta",
    ) -> None:
        """`stored` is the safetensors dtype of the format's float tensors, `dtype` that of activations and bias."""
        super().__init__()
        self.kind, self.params, self.dtype = kind, dict(params), dtype
        self.out_features, self.in_features = shape
        for name, (tensor_dtype, size) in registry.by_kind(kind).spec(params, shape, stored).items():
            self.register_buffer(name, torch.empty(size, dtype=dtypes.TORCH[tensor_dtype], device=device))
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device), False) if bias else None
        self.exact = False
        self.prepared: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.out_features, self.in_features

    @property
    def path(self) -> str:
        """Name of the kernel path that runs; "unprepared" where the weight is offloaded and decoded on each call."""
        return "unprepared" if self.prepared is None else self.prepared.path

    @property
    def _kernel(self) -> ModuleType:
        return importlib.import_module(f"compress_kernels.{self.kind}")

    def _prepare(self, exact: bool) -> Any:
        return self._kernel.prepare(dict(self.named_buffers()), self.params, self.shape, self.dtype, exact)

    def prepare(self, exact: bool | None = None) -> None:
        """Build what the kernel needs from the loaded buffers; `exact` keeps to paths that equal the reference."""
        self.exact = self.exact if exact is None else exact
        offloaded = any(b.is_meta for b in self.buffers())
        self.prepared = None if offloaded else self._prepare(self.exact)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., I) -> (..., O)."""
        return self._kernel.linear(x, self.prepared or self._prepare(exact=True), self.bias)

    def dense_weight(self) -> torch.Tensor:
        """The weight (O, I) in fp32."""
        form = registry.by_kind(self.kind)
        return form.dequantize(Packed(self.kind, form.VERSION, self.params, dict(self.named_buffers()), self.shape))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompressedLinear:
        """Move with `.to()`, `.cuda()`, …; then prepare again for the new device and dtype."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.prepared is not None:
            self.prepare()
        return self

    def extra_repr(self) -> str:
        params = ", ".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.in_features} -> {self.out_features}, {self.kind}({params}), {self.path}"


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, I) of a linear, None for any other module. A Conv1D keeps its weight as (I, O); artifacts hold (O, I)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":
        return module.nf, module.nx
    return None


def place(model: nn.Module, name: str, value: nn.Module | torch.Tensor) -> None:
    """Put a module, parameter or buffer in the place of the one that is called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def prepare(model: nn.Module, exact: bool) -> None:
    """Prepare every compressed linear of a model whose tensors are in place."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            try:
                module.prepare(exact)
            except ValueError as error:
                hint = "use another value" if isinstance(error, BackendError) else "the artifact is damaged: copy it again"
                raise CompressError(f"{name}: {error}", hint=hint) from error

"""One token through a whole Llama-like model: `lower` each linear, then `cpu.Decoder` where `cpu.can_run` lets it.

`reference.step` defines the result. Without the C++ library there is no faster path than the model's own forward.
"""

from __future__ import annotations

from typing import Any

import torch

from compress_kernels.block.cpu import ROWS, Decoder, can_run, pointers
from compress_kernels.block.reference import Block, Linear, Shape, Weight
from compress_kernels.masked_delta import single
from compress_kernels.masked_delta.reference import Delta, Shared

__all__ = ["ROWS", "Block", "Decoder", "Linear", "Shape", "can_run", "lower", "pointers", "with_delta"]


def lower(prepared: Any, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear | str:
    """A linear of a kind's `Prepared` weight, or the reason why there is none for it."""
    weight = getattr(prepared, "native", None)
    if weight is None:
        weight = getattr(prepared, "weight", None)  # decoded once, dense
    if isinstance(weight, Weight):
        return Linear(weight, bias, dtype)
    core = getattr(prepared, "core", None)
    if core is not None and core.native is not None:
        return "its blocks do not divide its shape"
    return f"its path is {prepared.path}"


def with_delta(
    base: torch.Tensor, bias: torch.Tensor | None, shared: Shared, delta: Delta, are_signs: bool, dtype: torch.dtype
) -> Linear | str:  # fmt: skip
    """A linear of a base weight and a task's masked delta, or the reason why there is none for it."""
    why = single.can_run(base, shared, dtype)
    return Linear(single.make(base, shared, delta, are_signs), bias, dtype) if why is None else why

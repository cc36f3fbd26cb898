"""One token through a whole Llama-like model: `lower` each linear, then `cpu.Decoder` where `cpu.can_run` lets it.

`reference.step` defines the result. Without the C++ library there is no faster path than the model's own forward.
"""

from __future__ import annotations

from typing import Any

import torch

from compress_kernels.block.cpu import ROWS, Decoder, can_run, pointers
from compress_kernels.block.reference import Block, Linear, Shape
from compress_kernels.int_grouped import cpu as int_grouped
from compress_kernels.native import masked

__all__ = ["ROWS", "Block", "Decoder", "Linear", "Shape", "can_run", "lower", "pointers"]


def lower(prepared: Any, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear | str:
    """A linear of a kind's `Prepared` weight, or the reason why there is none for it."""
    weight = getattr(prepared, "native", None)
    if weight is None:
        weight = getattr(prepared, "weight", None)  # decoded once, dense
    one = isinstance(weight, int_grouped.Weight | masked.Weight | torch.Tensor)  # and not several products
    return Linear(weight, bias, dtype) if one else f"its path is {prepared.path}"

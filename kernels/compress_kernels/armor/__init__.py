"""y = A S B x + bias for ARMOR's weights, a sparse core S between block diagonals: `prepare` once after loading, then `linear`.

The core runs by a path of its own kind, `sparse24` or `sparse24_int`; the blocks are batched products beside it, or, for few rows
of x and a core in the C++ library, all three are one call (`cpu`). `reference` defines the three products and their roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress_kernels import _sparse
from compress_kernels.armor import cpu, reference
from compress_kernels.native import masked


@dataclass(frozen=True, slots=True)
class Prepared:
    """One weight, ready to run."""

    path: str  # the core's: "cpu", "dense" or "tiled"
    kind: str  # of the core
    core: _sparse.Prepared
    pre: torch.Tensor  # (ceil(I/b), b, b): in the activations' dtype unless the path is "tiled", then as stored
    post: torch.Tensor  # (ceil(O/b), b, b)
    native: cpu.Weight | None = None  # "cpu", where the blocks divide the shape

    @property
    def reasons(self) -> Mapping[str, str]:
        """Faster path of the core -> why it cannot run."""
        return self.core.reasons

    @property
    def spare(self) -> bool:
        """Whether the artifact's tensors need not stay in memory."""
        return self.core.spare


def prepare(
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """Choose a path for a weight of `shape` (O, I), given as the artifact's tensors, and activations of `dtype`.

    Damaged tensors raise a ValueError. `exact` keeps to the reference's weights, rounded to
    the activations' dtype.
    """
    _sparse.refuse(reference.block_problems(tensors, params, shape), shape)
    kind, pre, post = reference.core_kind(params), reference.stack(tensors, "pre"), reference.stack(tensors, "post")
    core = reference.CORES[kind].prepare(tensors, params, shape, dtype, exact)
    if core.path != _sparse.TILED:
        pre, post = pre.to(dtype), post.to(dtype)
    whole = pre[:, 0].numel() == shape[1] and post[:, 0].numel() == shape[0]
    native = cpu.make(pre, post, core.native) if core.native is not None and whole else None
    return Prepared(core.path, kind, core, pre, post, native)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    p = prepared
    if p.native is not None and masked.few(x):
        y = cpu.linear(x, p.native)
        return y if bias is None else y + bias
    y = reference.CORES[p.kind].linear(reference.blocks(x, p.pre), p.core)
    return reference.blocks(y, p.post, bias)

"""y = x (W0 + s_t d_t)ᵀ + bias: products with one base and many tasks' masked deltas.

`linear` runs in our C++ library (`cpu`) where it can, and as `reference` has it elsewhere, or where COMPRESS_BACKEND is "tiled".
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence

import torch

from compress_kernels import backend
from compress_kernels.masked_delta import cpu, reference
from compress_kernels.masked_delta.reference import Delta, Shared, decode, decode_shared, groups, unpack_mask, values

__all__ = ["Delta", "Shared", "decode", "decode_shared", "groups", "linear", "unpack_mask", "values"]

logger = logging.getLogger(__name__)


def linear(
    x: torch.Tensor, W0: torch.Tensor, bias: torch.Tensor | None, shared: Shared, deltas: Mapping[str, Delta], are_signs: bool,
    tasks: Sequence[str | None],
) -> torch.Tensor:  # fmt: skip
    """x (B, …, I) with one task per row, or per equal run of rows -> (B, …, O) in x's dtype. W0 (O, I) has x's dtype."""
    if any(t in deltas for t in tasks) and len(x) and len(x) % len(tasks) == 0:
        why = "COMPRESS_BACKEND is tiled" if backend("cpu", "tiled") == "tiled" else cpu.can_run(x, W0, bias, shared)
        if why is None:
            return cpu.linear(x, W0, bias, shared, deltas, are_signs, tasks)
        _say_once(why)
    return reference.linear(x, W0, bias, shared, deltas, are_signs, tasks)


@functools.cache
def _say_once(why: str) -> None:
    logger.info("masked_delta: deltas are decoded on each call, not by cpu: %s", why)

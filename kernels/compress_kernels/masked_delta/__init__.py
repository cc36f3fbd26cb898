"""Products with one base and many tasks' masked deltas. `reference` is the definition and the only path so far."""

from __future__ import annotations

from compress_kernels.masked_delta.reference import (
    Delta,
    Shared,
    decode,
    decode_shared,
    groups,
    linear,
    unpack_mask,
    values,
)

__all__ = ["Delta", "Shared", "decode", "decode_shared", "groups", "linear", "unpack_mask", "values"]

"""Kernels for compressed linears. Needs torch only; the reference of each kind is its definition."""

from __future__ import annotations

import os

BACKENDS = {
    "cpu": "the C++ kernels of this package",
    "cpu-exact": "the same, with activations kept as they are",
    "triton": "the GPU kernels of this package",
    "int4pack": "torch's CPU kernel for 4 bits",
    "dense": "weights decoded once and held dense",
    "tiled": "tiles decoded on every call, in torch",
}


class BackendError(ValueError):
    """A backend was asked for that does not exist."""


def backend(*has: str) -> str | None:
    """What the environment variable COMPRESS_BACKEND asks for, if it is among the paths that a kind `has`; None: as is best."""
    chosen = os.environ.get("COMPRESS_BACKEND")
    if chosen and chosen not in BACKENDS:
        raise BackendError(f"COMPRESS_BACKEND is {chosen!r}; there are {', '.join(BACKENDS)}")
    return chosen if chosen in has else None

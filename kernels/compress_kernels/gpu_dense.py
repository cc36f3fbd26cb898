"""How much memory dense copies of compressed weights may take on a GPU: none, unless COMPRESS_GPU_DENSE names it (8G, 500M, all).

With a copy a weight's long products are the vendor's, no slower than a dense model's, wherever the table of measurements does not
have something faster; it costs two bytes per weight. Copies are made while weights are prepared, in that order, until the memory
is used up, and never later: a product allocates nothing but its result and scratch.
"""

from __future__ import annotations

import os
import weakref

import torch

from compress_kernels import BackendError

_used: dict[torch.device, int] = {}


def allowed() -> float:
    """Bytes per device that COMPRESS_GPU_DENSE names."""
    text = os.environ.get("COMPRESS_GPU_DENSE", "0").strip()
    if text.lower() == "all":
        return float("inf")
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1:].upper())
    try:
        size = float(text if unit is None else text[:-1]) * (1 << (unit or 0))
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise BackendError(f"COMPRESS_GPU_DENSE is {text!r}; it is a number of bytes, as 8G or 500M, or all")
    return size


def used(device: torch.device) -> int:
    """Bytes of the copies that are alive on a device."""
    return _used.get(device, 0)


def room(size: int, device: torch.device) -> bool:
    """Whether a copy of `size` bytes may be made on a device."""
    return used(device) + size <= allowed()


def note(owner: object, copy: torch.Tensor | None) -> None:
    """Count a copy as long as its owner lives."""
    if copy is not None:
        size = copy.numel() * copy.element_size()
        _used[copy.device] = used(copy.device) + size
        weakref.finalize(owner, _forget, copy.device, size)


def _forget(device: torch.device, size: int) -> None:
    _used[device] -= size

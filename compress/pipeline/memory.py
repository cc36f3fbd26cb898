"""Memory of this process: how much it holds, and how it is given back."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # malloc.h


def rss() -> int:
    """Resident memory of this process in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _libc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@contextmanager
def long_run() -> Iterator[None]:
    """Settings for a walk: large tensors are mapped, and the libraries' objects are not searched for garbage after every block.

    The search would take 0.2 s a block: importing torch and transformers leaves a million objects.
    """
    map_large_tensors()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim() -> None:
    """Give freed memory back to the system, so that one block's garbage does not add to the next one's peak."""
    gc.collect()
    release()


def release() -> None:
    """`trim` for work that leaves no cycles behind: a search for them takes 0.2 s."""
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def map_large_tensors() -> None:
    """Make glibc map every tensor above 8 MB by itself: its memory goes back to the system the moment it is freed.

    By default that limit grows to 32 MB with use, and the holes that tensors leave in the heap add up to a tenth to the peak.
    A limit of 1 MB is as flat but makes AWQ a third slower on a small model; 8 MB costs no time.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 8 << 20)

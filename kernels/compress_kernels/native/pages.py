"""Memory for large weights, in huge pages where Linux gives them.

A product reads a weight once, so with pages of 4 KB it waits for the processor to look up thousands of them: 20 to 40 % of its time
where what ran before has emptied the caches (docs/log.md).
"""

from __future__ import annotations

import contextlib
import mmap

import torch

HUGE = 2 << 20  # bytes of a huge page


def empty(count: int) -> torch.Tensor:
    """uint8 (count,), not filled. From HUGE bytes on they begin at a huge page, and whole ones are asked for."""
    if count < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.uint8)
    room = mmap.mmap(-1, count + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # what is never touched takes no memory
    start = -torch.frombuffer(room, dtype=torch.uint8, count=1).data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE, start, count // HUGE * HUGE)
    return torch.frombuffer(room, dtype=torch.uint8, count=count, offset=start)

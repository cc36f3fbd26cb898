"""Which kernel path is the fastest for a kind of weight on this machine, measured, and kept for the loads to come.

On a GPU (`gpu`) the question is in which blocks the Triton kernels run, per width, shape and number of rows; the table is
`compress_kernels.gpu_table`'s. The rest is about CPUs.

Paths of one case are timed in turns over cold copies of a weight, with 1 and with 16 rows of x. The shortest times count, since
what else the machine does only adds. The usual path stays unless another one has a product of the two times that is a fifth below
its own. With the C++ library only paths that native decoding can take are chosen; others are timed and shown
(COMPRESS_BACKEND takes them). `compress_kernels.dispatch` keeps the table and reads it when a weight is prepared.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compress_kernels import dispatch, gpu_table, gpu_tune

from compress import subjects, timing
from compress.checkpoint.writer import disk_errors
from compress.errors import CompressError, nearest
from compress.modules import CompressedLinear

SHAPES = ((576, 576), (2048, 2048), (4096, 4096))  # one per class of sizes
ROWS = (1, 16)
_QUICK = ("cpu", "int4pack", "dense", "tiled")  # paths that may change an activation's last bits, but not its dtype
_LEAST, _MOST, _MARGIN = 6, 100, 0.8


@dataclass(frozen=True, slots=True)
class Case:
    """One case of the table: the paths that can run, and milliseconds by rows of x."""

    key: str
    best: str
    ms: dict[str, list[float]]
    faster: str | None = None  # a path that was faster still, but that native decoding cannot take


@contextmanager
def _asking(path: str) -> Iterator[None]:
    """COMPRESS_BACKEND while weights are prepared."""
    before = os.environ.get("COMPRESS_BACKEND")
    os.environ["COMPRESS_BACKEND"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["COMPRESS_BACKEND"]
        else:
            os.environ["COMPRESS_BACKEND"] = before


@torch.inference_mode()
def tune(kinds: Sequence[str] = (), shapes: Sequence[tuple[int, int]] = SHAPES, seconds: float = 1.0) -> Iterator[Case]:
    """Measure every kind of `subjects.KINDS` that has several paths on every shape; yields a case as soon as it is decided."""
    for name in kinds:
        if name not in subjects.KINDS:
            raise CompressError(f"{name!r} is no kind", hint=nearest(name, list(subjects.KINDS)), usage=True)
    for shape in shapes:
        for kind in kinds or subjects.KINDS:
            case = None if kind == "armor" else _case(kind, shape, seconds)  # armor takes its core's path
            if case is not None:
                yield case
            gc.collect()  # modules refer to themselves


def keep(cases: Sequence[Case]) -> Path:
    """Add cases to this machine's table; returns its file."""
    with disk_errors(dispatch.path()):
        return dispatch.save({**dispatch.read(dispatch.path()), **{c.key: c.best for c in cases}})


def _case(kind: str, shape: tuple[int, int], seconds: float) -> Case | None:
    g = torch.Generator().manual_seed(0)
    first = subjects.KINDS[kind](*shape, g)
    size = sum(t.numel() * t.element_size() for t in first.tensors.values())
    found: dict[str, list[CompressedLinear]] = {}
    for path in _QUICK:
        with _asking(path):
            one = subjects.module(first)
            if one.path.split("+")[0] == path:
                copies = range(timing._copies(size) - 1)
                found[path] = [one, *(subjects.module(subjects.KINDS[kind](*shape, g)) for _ in copies)]
    if len(found) < 2:
        return None
    times: dict[str, list[float]] = {path: [] for path in found}
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=g).bfloat16()
        for path, seen in _turns(found, x, seconds).items():
            times[path].append(1e3 * min(seen[1:]))
    best, fastest = _best(times, dispatch.candidates(list(times))), _best(times, list(times))
    bits = int(first.params.get("bits", 16))
    return Case(dispatch.key(first.kind, bits, torch.bfloat16, shape), best, times, None if fastest == best else fastest)


def _best(times: dict[str, list[float]], among: Sequence[str]) -> str:
    """The fastest of some paths, or the first of them where the fastest is not clearly faster."""
    best = min(among, key=lambda path: math.prod(times[path]))
    return best if math.prod(times[best]) < _MARGIN * math.prod(times[among[0]]) else among[0]


def _turns(paths: dict[str, list[CompressedLinear]], x: torch.Tensor, seconds: float) -> dict[str, list[float]]:
    """Seconds of every path's products, in turns."""
    times: dict[str, list[float]] = {path: [] for path in paths}
    end, turn = time.perf_counter() + seconds, 0
    while turn < _LEAST or (turn < _MOST and time.perf_counter() < end):
        for path, copies in paths.items():
            start = time.perf_counter()
            copies[turn % len(copies)](x)
            times[path].append(time.perf_counter() - start)
        turn += 1
    return times


WIDTHS = {f"int{bits}": bits for bits in (2, 3, 4, 8)}  # kinds that run on a GPU


def gpu(
    device: str, kinds: Sequence[str], shapes: Sequence[tuple[int, int]], group: int, progress: Callable[[dict[str, Any]], None]
) -> Path:  # fmt: skip
    """Measure grouped integers (int4 unless `kinds` says otherwise) of shapes (O, I) on a GPU; returns its table's file.

    `shapes` are Llama-3-8B's, with q, k, v and gate, up as one, unless given; `group` -1: one scale per row. Raises CompressError
    for other kinds, shapes that are no multiple of the group, and a table that is damaged.
    """
    for name in kinds:
        if name not in WIDTHS:
            raise CompressError(f"{name!r} has no kernel on a GPU", hint=nearest(name, list(WIDTHS)), usage=True)
    for O, I in shapes:
        if I % 256 or O % gpu_tune.TILE:
            hint = f"outputs in multiples of {gpu_tune.TILE}, inputs of 256"
            raise CompressError(f"{O}x{I} cannot be measured", hint=hint, usage=True)
    widths = [WIDTHS[name] for name in kinds] or [4]
    try:
        with torch.cuda.device(device), disk_errors(gpu_table.user_table(torch.cuda.get_device_name())):
            return gpu_tune.tune(widths, [0 if group == -1 else group], shapes or gpu_tune.SHAPES, progress=progress)
    except ValueError as error:
        raise CompressError(str(error), hint="remove the file, or set COMPRESS_GPU_TABLE to another") from error

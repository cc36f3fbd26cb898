"""Times every way worth trying on the GPU at hand, and the dense product beside them, and writes its table (`gpu_table`).

Nothing here runs while a model is served.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from compress_kernels import gpu_table
from compress_kernels.int_grouped import triton as int_grouped

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (14336, 4096))  # Llama-3-8B, q/k/v and gate/up as one
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
TILE = int_grouped.TILE
COLD = 192 << 20  # bytes of weights that calls go round through: more than three times an H200's L2 cache
_CALLS = 16  # in a graph, at least


def random_weight(
    O: int, I: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype, device: torch.device
) -> int_grouped.Weight:
    """A weight of random codes in the kernel's layout; `group` 0: one scale per row. O and I are multiples of a tile."""
    KB, tiles = int_grouped.columns(bits, group), -(-O // int_grouped.TILE)
    words = torch.empty(tiles * int_grouped.TILE, I * bits // 16, dtype=torch.int16, device=device)
    words.random_(-(1 << 15), 1 << 15)
    KT, planes = -(-I // KB), 3 if bits == 3 else 1
    W = KB * bits // 16 // planes
    groups = I // group if group else 1
    scale = (torch.rand(groups, tiles * int_grouped.TILE, device=device) + 0.5) / (2**bits * I**0.5)
    zero = (
        torch.full(scale.shape, 1 << (bits - 1), device=device)
        if symmetric
        else torch.randint(0, 1 << bits, scale.shape, device=device)
    )
    stats = zero.to(torch.int32) << 16 | scale.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    locks = int_grouped.counters(tiles, device)
    shaped = words.view(tiles, KT, planes, int_grouped.TILE, W)
    return int_grouped.Weight((O, I), bits, group, shaped, stats, None, dtype == torch.bfloat16, locks)


def copies(size: int) -> int:
    """How many weights of `size` bytes make a round of COLD bytes."""
    return max(2, min(256, -(-COLD // size)))


def graph_times(calls: Sequence[Callable[[], object]], seconds: float = 0.2, least: int = 5) -> list[float]:
    """Microseconds per call, one number per replay of a CUDA graph in which the calls follow each other at least 16 times.

    The calls run once before capture, so that everything is compiled.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    turns = max(len(calls), -(-_CALLS // len(calls)) * len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), turns):
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    while len(times) < least + 1 or (sum(times) * turns < seconds * 1e6 and len(times) < 200):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / turns)
    return times[1:]


def wall_times(calls: Sequence[Callable[[], object]], seconds: float = 0.0, least: int = 1) -> list[float]:
    """As `graph_times`, by the clock and without a GPU: it shows that the calls run, not how fast."""
    times = []
    for call in islice(cycle(calls), least):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


Timer = Callable[..., list[float]]


def measure(
    bits: int, group: int, shape: tuple[int, int], rows: Sequence[int] = ROWS, dtype: torch.dtype = torch.bfloat16,
    symmetric: bool = False, device: torch.device | None = None, quick: bool = False, timer: Timer = graph_times,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The fastest way for each number of rows of x, as rows of a table, with the time of the dense product beside it.

    `shape` (O, I); `timer` is `graph_times`, or `wall_times` where there is no GPU.
    """
    device = device or torch.device("cuda")
    O, I = shape
    count = copies(O * I * bits // 8)
    weights = [random_weight(O, I, bits, group, symmetric, dtype, device) for _ in range(count)]
    dense = [torch.randn(O, I, device=device).to(dtype) for _ in range(copies(2 * O * I))]
    for M in rows:
        x = torch.randn(M, I, device=device).to(dtype)
        y = x.new_empty(M, O)
        theirs = statistics.median(timer([partial(torch.mm, x, W.T, out=y) for W in dense], 0.05))
        found: list[tuple[float, gpu_table.Choice]] = []
        for how in gpu_table.candidates(bits, M, quick):
            calls = [partial(int_grouped.run, x, w, None, y, how) for w in weights]
            try:
                found.append((statistics.median(timer(calls, 0.05)), how))
            except Exception as error:  # a candidate may need more shared memory than there is
                if type(error).__name__ not in ("OutOfResources", "PTXASError"):
                    raise
        time, how = min(found, key=lambda f: f[0])
        times = {"us": round(time, 3), "dense_us": round(theirs, 3)}
        yield {"bits": bits, "group": group, "O": O, "I": I, "M": M, **asdict(how), **times}


def tune(
    bits: Sequence[int] = (4,), groups: Sequence[int] = (128,), shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS, path: Path | None = None, progress: Callable[[dict[str, Any]], None] | None = None,
    quick: bool = False, seconds: float = float("inf"), device: torch.device | None = None,
) -> Path:  # fmt: skip
    """Measure and write the table of the current CUDA device; rows of other widths, groups and shapes in it are kept.

    `path` is `gpu_table.user_table` unless given. No weight is begun after `seconds`. `device` "cpu" goes through all of it in
    Triton's interpreter, by `wall_times`. Raises RuntimeError where there is no CUDA device.
    """
    dry = device is not None and device.type == "cpu"
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device to measure on")
    end = time.monotonic() + seconds
    name = "interpreter" if dry else torch.cuda.get_device_name()
    path = path or gpu_table.user_table(name)
    old = gpu_table.read(path)["rows"] if path.is_file() else []
    new: list[dict[str, Any]] = []
    for width in bits:
        for group in groups:
            for shape in shapes:
                if time.monotonic() > end:
                    continue
                for row in measure(width, group, shape, rows, device=device, quick=quick, timer=wall_times if dry else graph_times):
                    new.append(row)
                    if progress is not None:
                        progress(row)
    return write(path, name, old, new)


def write(path: Path, device: str, old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> Path:
    """Write a table: `new`, and what `old` has of other weights. The file is replaced as a whole."""
    measured = {gpu_table.key(row) for row in new}
    rows = [row for row in old if gpu_table.key(row) not in measured] + list(new)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    body = ",\n  ".join(json.dumps(row) for row in rows)
    text = f'{{\n"device": {json.dumps(device)},\n"torch": {json.dumps(torch.__version__)},\n"rows": [\n  {body}\n]\n}}\n'
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    gpu_table.forget()
    return path

"""What a run will cost, from headers alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from compress.checkpoint import dtypes
from compress.models.skeleton import Skeleton
from compress.models.view import CheckpointView
from compress.pipeline.layout import Layout
from compress.pipeline.memory import rss
from compress.types import Block, Stat


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted cost of a run; sizes in bytes."""

    artifact_bytes: int  # weight files
    source_bytes: int
    bits_per_weight: float  # of the compressed linears
    peak_memory: int
    seconds: float
    exact: bool = True  # of artifact_bytes; False where gradients will decide widths or counts


def on_disk(states: str, tokens: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the calibration states of a run lie on disk; `auto`: when a few copies of them exceed 4 GiB."""
    return states == "disk" or (states == "auto" and 3 * tokens * width * dtype.itemsize > 4 << 30)


def _block_bytes(skeleton: Skeleton, view: CheckpointView, index: int) -> tuple[int, int, int]:
    """(elements, stored bytes, elements of the largest linear) of one block."""
    prefix = skeleton.prefix(index)
    names = [n for n in view.names if n.startswith(prefix)]
    elements = {n: torch.Size(view.shape(n)).numel() for n in names}
    stored = sum(count * dtypes.itemsize(view.dtype(n)) for n, count in elements.items())
    return sum(elements.values()), stored, max(elements.values())


def estimate(
    skeleton: Skeleton, view: CheckpointView, layout: Layout, method: ModuleType, config: Any, size: int, tokens: int,
    batch_size: int, seqlen: int, dtype: torch.dtype, states: str,
) -> Estimate:  # fmt: skip
    """Predict size, peak memory and time of one forward walk."""
    blocks = range(len(skeleton.blocks))
    elements, stored, largest = max((_block_bytes(skeleton, view, i) for i in blocks), key=lambda t: t[0])
    weights = sum(t.shape[0] * t.shape[1] for t in layout.targets.values())
    packed = {p.name: p.nbytes for p in layout.plan if _packed(p.name, layout)}
    peak = rss() + stored + packed_bytes(packed, skeleton)
    rest = [p.nbytes for p in layout.plan if not p.name.startswith(skeleton.path)]
    if tokens:
        peak += _data_bytes(skeleton, layout, method, config, tokens, batch_size, seqlen, dtype, states, elements, largest)
    else:
        scratch = method.workspace(_meta_block(skeleton, layout), config) if hasattr(method, "workspace") else 0
        peak += max(scratch, 13 * largest)  # fp32 copies and codes of one linear, measured
    peak = max(peak, rss() + 2 * min(max(rest, default=0), 64 << 20))
    return Estimate(
        size,
        sum(e.nbytes for e in view.reader.entries.values()),
        8 * sum(packed.values()) / weights,
        peak,
        _seconds(method, config, weights, tokens, size),
    )


def _packed(name: str, layout: Layout) -> bool:
    linear, _, suffix = name.rpartition(".")
    return linear in layout.targets and suffix != "bias"


def reverse_bytes(
    skeleton: Skeleton, view: CheckpointView, reducers: int, samples: int, seqlen: int, dtype: torch.dtype, states: str,
    trains: bool = False,
) -> int:  # fmt: skip
    """Peak of a reverse walk: a block in the compute dtype, its activations and gradients, scores, and every block's inputs.

    With `trains` also the trained weights and the gradients, in fp32, and the file that holds them.
    """
    blocks = range(len(skeleton.blocks))
    elements, stored, largest = max((_block_bytes(skeleton, view, i) for i in blocks), key=lambda t: t[0])
    config = skeleton.config.get_text_config()
    outputs = sum(shape[0] + shape[1] for shape in skeleton.linears(0).values())
    activations = 3 * seqlen * outputs * dtype.itemsize
    width = config.hidden_size
    disk = on_disk(states, samples * seqlen * (len(blocks) + 1) // 3, width, dtype)
    kept = 0 if disk else samples * seqlen * width * dtype.itemsize * (len(blocks) + 3)
    scores = reducers * 8 * elements + 12 * largest + (20 * elements if trains else 0)
    head = 4 * min(8192, config.vocab_size) * (width + 2 * 2048) + 24 * min(samples * seqlen, 4096) * width
    return rss() + max(stored + elements * dtype.itemsize + activations + scores, head) + kept


def packed_bytes(packed: dict[str, int], skeleton: Skeleton) -> int:
    """Packed bytes of the average block."""
    return sum(packed.values()) // len(skeleton.blocks)


def _meta_block(skeleton: Skeleton, layout: Layout) -> Block:
    """The first block without its weights' values."""
    prefix = skeleton.prefix(0)
    meta = {n: torch.empty(s, device="meta") for n, s in skeleton.linears(0).items() if prefix + n in layout.targets}
    return Block(0, meta, {}, skeleton.groups(0), skeleton.scalings(), skeleton.no_clip(0))


def _data_bytes(
    skeleton: Skeleton, layout: Layout, method: ModuleType, config: Any, tokens: int, batch_size: int, seqlen: int,
    dtype: torch.dtype, states: str, elements: int, largest: int,
) -> int:  # fmt: skip
    shapes = skeleton.linears(0)
    block = _meta_block(skeleton, layout)
    collect = method.collects(block, config)
    width = skeleton.config.get_text_config().hidden_size
    statistics = 0
    for name, want in collect.stats.items():
        inputs = shapes[name][1]
        if Stat.GRAM in want:
            statistics += 4 * inputs * min(tokens, inputs)
        elif Stat.GROUP_GRAM in want:
            statistics += 4 * inputs * (inputs if collect.group == -1 else collect.group)
    recovers = bool(getattr(config, "recover", 0))
    kept = tokens * width * dtype.itemsize * (2 + 2 * recovers + len(collect.modules))
    kept = 0 if on_disk(states, tokens, width, dtype) else kept
    activations = batch_size * seqlen * max(max(s) for s in shapes.values()) * dtype.itemsize * 4
    scratch = method.workspace(block, config) if hasattr(method, "workspace") else 24 * largest
    rotated = 24 * largest if getattr(config, "rotate", False) else 0  # fp64 while a tensor is read
    trained = 28 * elements if recovers else 0  # values, gradients, two moments, two copies, the weights that they make
    return statistics + kept + activations + elements * dtype.itemsize + max(scratch, rotated, trained)


def reverse_seconds(layout: Layout, tokens: int, widths: int) -> float:
    """A forward pass, one with gradients, a product per linear for the scores, and one per width that is tried."""
    weights = sum(t.shape[0] * t.shape[1] for t in layout.targets.values())
    return 2 * weights * tokens * (4 + widths) / _flops() + weights * 4.5e-8 * widths


def _flops() -> float:
    """Of a matrix product, measured now."""
    a = torch.randn(512, 512)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 512**3 / (time.perf_counter() - start)


def _seconds(method: ModuleType, config: Any, weights: int, tokens: int, size: int) -> float:
    """From a matrix product measured now; a rough guide."""
    flops = _flops()
    rounding = weights * 4.5e-8
    own = method.seconds(config, weights) if hasattr(method, "seconds") else rounding
    if not tokens:
        return own + size / 3e8
    if getattr(method, "VERB", "") in ("prune", "factorize"):
        walks = 1 + bool(getattr(config, "propagate", False)) + bool(getattr(config, "sequential", False)) + 4 * config.recover
        return own + 2 * weights * tokens * walks / flops + size / 3e8
    if hasattr(method, "stages"):
        passes = 3 if getattr(config, "sequential", False) else 2
        return 12 * rounding + 2 * weights * tokens * (passes + 1) / flops + size / 3e8
    tried = (getattr(config, "grid", 20) + 2) * (0.125 if getattr(config, "search", "") == "fast" else 1) + getattr(
        config, "keep", 4
    )
    return rounding * (tried + 12) + 2 * weights * tokens * (tried + 2) / flops + size / 3e8

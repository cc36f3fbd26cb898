"""Several weights that read the same x (q, k, v; gate, up) as one, multiplied in one launch.

Their words, statistics, outliers and dense copies lie one behind the other, each from a multiple of 128 rows on, so a product
with the whole has each one's outputs side by side. The weights themselves become views of the whole: they can still be used
alone, and nothing lies in memory twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from compress_kernels import gpu_dense
from compress_kernels.int_grouped import triton
from compress_kernels.int_grouped.triton import TILE, Outliers, Weight


def why_not(weights: Sequence[Weight]) -> str | None:
    """None, or the reason why these weights cannot be one."""
    kinds: dict[str, list[Hashable]] = {
        "inputs": [w.shape[1] for w in weights],
        "bits": [w.bits for w in weights],
        "groups": [w.group for w in weights],
        "types of scales": [(w.scale is None, w.bf16) for w in weights],
        "outliers": [None if w.outliers is None else w.outliers.bf16 for w in weights],
        "devices": [w.words.device for w in weights],
    }
    differ = [what for what, of in kinds.items() if len(set(of)) > 1]
    if differ:
        return f"their {' and '.join(differ)} differ"
    if sum(w.words.numel() for w in weights) >= triton._MOST:
        return "together they have more than 2^31 words"
    return None


def fuse(weights: Sequence[Weight]) -> tuple[Weight, list[Weight]]:
    """The weights as one, and each again as a view of it. Raises ValueError with the reason where they differ."""
    why = why_not(weights)
    if why is not None:
        raise ValueError(why)
    head = weights[0]
    words, stats = torch.cat([w.words for w in weights]), torch.cat([w.stats for w in weights], 1)
    scale = None if head.scale is None else torch.cat([w.scale for w in weights if w.scale is not None], 1)
    side = _joined([w.outliers for w in weights if w.outliers is not None])
    copies = [w.dense for w in weights if w.dense is not None]
    same = len(copies) == len(weights) and len({c.dtype for c in copies}) == 1
    shape = len(words) * TILE, head.shape[1]
    locks = triton.counters(len(words), words.device)
    whole = Weight(shape, head.bits, head.group, words, stats, scale, head.bf16, locks, side, torch.cat(copies) if same else None)
    gpu_dense.note(whole, whole.dense)
    members, tile = [], 0
    for w in weights:
        members.append(_part(whole, w, tile))
        tile += len(w.words)
    return whole, members


def _part(whole: Weight, w: Weight, tile: int) -> Weight:
    """Weight w, whose tiles begin at `tile` of the whole, as a view of it."""
    end = tile + len(w.words)
    rows, side = slice(tile * TILE, end * TILE), whole.outliers
    if side is not None:  # starts count from the whole's first entry
        side = side._replace(starts=side.starts[tile : end + 1], run_starts=side.run_starts[tile : end + 1])
    return replace(
        w, words=whole.words[tile:end], stats=whole.stats[:, rows], scale=None if whole.scale is None else whole.scale[:, rows],
        outliers=side, dense=None if whole.dense is None else whole.dense[rows],
    )  # fmt: skip


def _joined(parts: Sequence[Outliers]) -> Outliers | None:
    """Outliers of weights whose tiles follow each other. Parts may be views of a whole, with more entries than are theirs."""
    if not parts:
        return None
    starts, run_starts, entries, rows, runs = [], [], [], [], []
    chunks = count = 0
    for p in parts:
        (a, b), (c, d) = ((int(s[0]), int(s[-1])) for s in (p.starts, p.run_starts))
        starts.append(p.starts[:-1] + (chunks - a))
        run_starts.append(p.run_starts[:-1] + (count - c))
        entries.append(p.entries[a:b])
        rows.append(p.run_rows[c:d])
        runs.append(p.runs[c:d])
        chunks, count = chunks + b - a, count + d - c
    starts.append(parts[0].starts.new_full((1,), chunks))
    run_starts.append(parts[0].starts.new_full((1,), count))
    return Outliers(torch.cat(starts), torch.cat(entries), torch.cat(run_starts), torch.cat(rows), torch.cat(runs), parts[0].bf16)


def joined_bias(biases: Sequence[torch.Tensor | None], weights: Sequence[Weight]) -> torch.Tensor | None:
    """Biases (O_i,) of the weights as the whole's (O,), made anew; None where there is none."""
    some = next((b for b in biases if b is not None), None)
    if some is None:
        return None
    parts = []
    for b, w in zip(biases, weights, strict=True):
        rows = len(w.words) * TILE
        parts.append(some.new_zeros(rows) if b is None else b if len(b) == rows else F.pad(b, (0, rows - len(b))))
    return torch.cat(parts)


def linear(x: torch.Tensor, whole: Weight, members: Sequence[Weight], biases: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """x (..., I) times each member's Wᵀ plus its bias, by one launch: outputs (..., O_i), views of one tensor."""
    y = triton.linear(x, whole, joined_bias(biases, members))
    out, first = [], 0
    for w in members:
        out.append(y[..., first : first + w.shape[0]])
        first += len(w.words) * TILE
    return out

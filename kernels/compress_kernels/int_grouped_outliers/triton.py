"""Outliers for the GPU product of grouped integers, which adds them in the same launch (`int_grouped/device.py`).

The program that owns 128 rows owns their outliers. Their words, the column in the low 16 bits and the value's own bits above,
lie in chunks of 8 per row, padded to as many chunks as the tile's long rows ask for; a row much longer than the others has the
rest in runs of 256, so that one long row does not pad 127 others. How many chunks a tile gets is what makes chunks and runs
fewest. Where the columns of a product are split over programs, these share the chunks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress_kernels.int_grouped import triton as int_grouped
from compress_kernels.int_grouped_outliers import reference

TILE = int_grouped.TILE
STEP, RUN = 8, 256
EMPTY = -0x80000000  # -0.0 in column 0
COLUMNS = 1 << 16


def can_run(bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason why this path cannot serve a weight of `shape` (O, I) and activations of `dtype`."""
    if shape[1] > COLUMNS:
        return f"{shape[1]} inputs, triton's outliers have columns below {COLUMNS}"
    return int_grouped.can_run(bits, group_size, shape, dtype, device)


def _caps(lengths: torch.Tensor) -> torch.Tensor:
    """Outliers per row (tiles,) that lie in chunks, multiples of 8, from the rows' lengths (tiles, 128)."""
    ranked = lengths.sort(1).values
    places = torch.tensor([TILE - 1, TILE - 2, TILE - 4, TILE - 8, TILE - 16, TILE - 32, TILE // 2], device=lengths.device)
    caps = (ranked[:, places] + STEP - 1) // STEP * STEP
    caps = torch.cat([caps, torch.zeros_like(caps[:, :1])], 1)  # (tiles, choices)
    over = (lengths[:, None, :] - caps[:, :, None]).clamp(min=0)
    time = caps // STEP + ((over + RUN - 1) // RUN).sum(2)  # a run has fewer words than a chunk, but sums over threads
    return caps.gather(1, time.argmin(1, keepdim=True)).squeeze(1)


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """(n,) as the first position of each, and the end, (n+1,) int64."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def prepare(indptr: torch.Tensor, index: torch.Tensor, value: torch.Tensor, shape: tuple[int, int]) -> int_grouped.Outliers:
    """The kernel's outliers from CSR parts of a weight (O, I), on their device."""
    O, device = shape[0], index.device
    tiles = -(-O // TILE)
    lengths = torch.zeros(tiles * TILE, dtype=torch.int64, device=device)
    lengths[:O] = indptr.to(torch.int64).diff()
    caps = _caps(lengths.view(tiles, TILE))
    starts = _starts(caps // STEP)
    left = (lengths - caps.repeat_interleave(TILE)).clamp(min=0)
    of_row = (left + RUN - 1) // RUN
    first_run = _starts(of_row)

    row = torch.repeat_interleave(torch.arange(tiles * TILE, device=device), lengths)
    rank = torch.arange(len(index), device=device) - indptr.to(torch.int64)[row]
    bits = (value + 0.0).view(torch.int16).to(torch.int32)  # no -0.0: that is the word of no outlier
    words = bits << 16 | index.to(torch.int32)
    tile, cap = row // TILE, caps[row // TILE]
    near = rank < cap
    entries = torch.full((int(starts[-1]), TILE, STEP), EMPTY, dtype=torch.int32, device=device)
    at = (starts[tile] + rank // STEP) * (TILE * STEP) + row % TILE * STEP + rank % STEP
    entries.view(-1)[at[near]] = words[near]
    runs = torch.full((int(first_run[-1]), RUN), EMPTY, dtype=torch.int32, device=device)
    at = first_run[row] * RUN + rank - cap
    runs.view(-1)[at[~near]] = words[~near]
    return int_grouped.Outliers(
        starts.to(torch.int32),
        entries,
        first_run[::TILE].to(torch.int32),
        torch.repeat_interleave(torch.arange(tiles * TILE, device=device) % TILE, of_row).to(torch.int32),
        runs,
        value.dtype == torch.bfloat16,
    )


def weight(
    tensors: Mapping[str, torch.Tensor], words: torch.Tensor, zero: torch.Tensor | None, shape: tuple[int, int], bits: int,
    dtype: torch.dtype | None = None,
) -> int_grouped.Weight:  # fmt: skip
    """The kernel's weight (O, I) from an artifact's tensors; zero (O, G) uint8 or None; dtype as for `int_grouped`."""
    side = prepare(tensors["outlier_indptr"], tensors["outlier_index"], tensors["outlier_value"], shape)
    return int_grouped.prepare(words, reference.stored_scales(tensors, shape[0]), zero, shape, bits, side, dtype)

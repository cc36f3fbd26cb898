"""Weights that are kept as they are, and a grid for the others.

A group's range is that of its other weights: kept slots are replaced by their mean before it is fitted, as SpQR does (arXiv
2306.03078; Vahe1994/SpQR `spqr_engine.py`). The optional second level quantizes the scales themselves, 3 bits over 16
consecutive output rows of one input group, before any code is computed. Zeros stay integers, so that the code at a kept slot
dequantizes to exactly 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal

import torch

from compress.formats import int_grouped_outliers
from compress.formats.int_grouped_outliers import reference
from compress.methods._pack import relative_error
from compress.methods._quantizer import Grid, fit, fit_weighted, pick_least, round_to
from compress.methods._solvers import Solved
from compress.types import Packed

ROWS, LEVELS = reference.ROWS, (1 << reference.SCALE_BITS) - 1  # of the second level: rows that share statistics, largest code
_PIECE = 1 << 22  # weights fitted at a time


@dataclass(frozen=True, slots=True)
class Fitted:
    """(scale, zero), fp32 (O, G), and what makes up the scales where there is a second level."""

    scale: torch.Tensor
    zero: torch.Tensor
    second: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # codes (O, G) uint8, offset and step (ceil(O/16), G)


def count(fraction: float, size: int) -> int:
    """ceil(fraction * size), in decimal arithmetic: 1 % of 100 is 1."""
    return math.ceil(Decimal(str(fraction)) * size)


def top(score: torch.Tensor, k: int) -> torch.Tensor:
    """Flat indices of the k largest entries of a score >= 0, largest first; of equals the first ones, (k,) int64."""
    flat = score.reshape(-1)
    if k >= flat.numel():
        return torch.argsort(flat, descending=True, stable=True)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    least = torch.topk(flat, k, sorted=False).values.min()
    above = (flat > least).nonzero()[:, 0]
    equal = (flat == least).nonzero()[: k - len(above), 0]
    above = above[torch.argsort(flat[above], descending=True, stable=True)]
    return torch.cat([above, equal])


def mask(index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(O, I) bool, true at flat indices."""
    out = torch.zeros(shape.numel(), dtype=torch.bool, device=index.device)
    out[index.long()] = True
    return out.view(shape)


def fit_others(
    W: torch.Tensor, kept: torch.Tensor, grid: Grid, weight: torch.Tensor | None, value_dtype: torch.dtype | None
) -> Fitted:  # fmt: skip
    """Fit the grid to the weights of W (O, I) fp32 that are not in `kept` (O, I) bool.

    `weight` (I,) is what errors cost (`fit_weighted`); None: the plain range. `value_dtype` asks for the second level and
    stores its statistics in that dtype.
    """
    g = grid.size(W.shape[1])
    rows = max(ROWS, _PIECE // W.shape[1] // ROWS * ROWS)
    parts = [_fit(w, m, grid, g, weight, value_dtype) for w, m in zip(W.split(rows), kept.split(rows), strict=True)]
    columns = [torch.cat(c) for c in zip(*((p.scale, p.zero, *(p.second or ())) for p in parts), strict=True)]
    return Fitted(columns[0], columns[1], (columns[2], columns[3], columns[4]) if len(columns) == 5 else None)


def _fit(
    W: torch.Tensor, kept: torch.Tensor, grid: Grid, g: int, weight: torch.Tensor | None, value_dtype: torch.dtype | None
) -> Fitted:  # fmt: skip
    v, m = W.view(W.shape[0], -1, g), kept.view(W.shape[0], -1, g)
    others = (~m).sum(-1).clamp(min=1)
    mean = v.masked_fill(m, 0.0).sum(-1) / others
    v = torch.where(m, mean.unsqueeze(-1), v)
    h = (torch.ones_like(v) if weight is None else weight.view(1, -1, g).expand_as(v)).masked_fill(m, 0.0)
    free = grid if value_dtype is None else replace(grid, scale_dtype=torch.float32)
    flat = v.reshape(W.shape)
    scale, zero = fit(flat, free) if weight is None else fit_weighted(flat, h.reshape(W.shape), free)
    if value_dtype is None:
        return Fitted(scale, zero)
    empty = m.all(-1)  # nothing to scale: must not stretch its neighbours' statistics
    place, offset, step = quantize_scales(scale, empty, value_dtype)
    codes = [place.round(), place.ceil()]  # the nearest scale, or the next one that cuts nothing off the range
    tried = []
    for new in (reference.scales(c.to(torch.uint8), offset, step) for c in codes):
        ratio = zero * scale / new
        rounded = (zero,) if grid.symmetric else (ratio.floor(), ratio.ceil())
        tried += [(new, z.clamp(0, grid.levels)) for z in rounded]
    scale, zero = pick_least(tried[0], tried, lambda s, z: round_to(v, s, z, grid).sub_(v).square_().mul_(h).sum(-1))
    chosen = torch.where(scale == tried[0][0], codes[0], codes[1]).to(torch.uint8)
    return Fitted(scale, zero, (chosen, offset, step))


def quantize_scales(
    scale: torch.Tensor, empty: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Where scales (O, G) > 0 lie among their codes, in 0..7 (O, G), with offset and step (ceil(O/16), G) in `dtype`.

    `empty` scales do not count.
    """
    O, G = scale.shape
    tiles = -(-O // ROWS)
    pad = tiles * ROWS - O
    s = torch.cat([scale, scale.new_zeros(pad, G)]).view(tiles, ROWS, G)
    skip = torch.cat([empty, empty.new_ones(pad, G)]).view(tiles, ROWS, G)
    lo, hi = s.masked_fill(skip, torch.inf).amin(1), s.masked_fill(skip, 0.0).amax(1)
    lo = torch.where(torch.isfinite(lo), lo, torch.ones_like(lo))
    offset = lo.to(dtype)
    offset = torch.where(offset > 0, offset, torch.full_like(offset, torch.finfo(dtype).smallest_normal))
    step = ((hi - offset.float()).clamp(min=0) / LEVELS).to(dtype)
    short = offset.float() + LEVELS * step.float() < hi
    step = torch.where(short, torch.nextafter(step, torch.full_like(step, torch.inf)), step)
    width = step.float()
    place = (s - offset.float().unsqueeze(1)) / torch.where(width > 0, width, torch.ones_like(width)).unsqueeze(1)
    place = place.clamp_(0, LEVELS).masked_fill_((width == 0).unsqueeze(1), 0.0)
    return place.view(-1, G)[:O], offset, step


def pack(
    W: torch.Tensor, solved: Solved, kept: torch.Tensor, fitted: Fitted, grid: Grid, dtype: torch.dtype
) -> tuple[Packed, float]:  # fmt: skip
    """Pack a solution with its kept values in `dtype`; W (O, I) fp32 only for the relative error of what unpacks again."""
    assert solved.value is not None
    index = kept.reshape(-1).nonzero()[:, 0]
    packed = int_grouped_outliers.pack(
        solved.q.cpu(),
        None if fitted.second else solved.scale.to(grid.scale_dtype).cpu(),
        None if grid.symmetric else solved.zero.to(torch.uint8).cpu(),
        bits=grid.bits,
        group_size=grid.group_size,
        index=index.cpu(),
        value=solved.value.reshape(-1)[index].to(dtype).cpu(),
        second=None if fitted.second is None else (fitted.second[0].cpu(), fitted.second[1].cpu(), fitted.second[2].cpu()),
    )
    return packed, relative_error(W, int_grouped_outliers.dequantize(packed))

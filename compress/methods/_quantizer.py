"""The common quantizer: every integer method calls it.

For one group v of `group_size` consecutive inputs of one row, choose (scale, zero) from its range and round:

    asymmetric  hi = max(max v, 0), lo = min(min v, 0), scale = (hi - lo)/(2^b - 1), zero = clamp(round(-lo/scale), 0, 2^b - 1)
    symmetric   scale = 2 max|v| / (2^b - 1)  ("full")  or  max|v| / (2^(b-1) - 1)  ("restricted"),  zero = 2^(b-1)
    q = clamp(round(v/scale) + zero, 0, 2^b - 1),   v_hat = (q - zero) * scale

The scale is rounded to its storage dtype *before* zero and codes are computed, so that the reconstruction in memory is the one
on disk. Rounding is half to even. `extend_zero=False` leaves the range as it is and reproduces llm-awq
`quantizer.py: pseudo_quantize_tensor`, which destroys a group of one sign whose range excludes 0.
Optional MSE clip search as IST-DASLab/gptq `quant.py`: 80 shrinks of the range, norm 2.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.errors import CompressError

SYM_SCALES = ("full", "restricted")
_CLIP_STEPS, _CLIP_GRID, _CLIP_NORM = 80, 100, 2.4


@dataclass(frozen=True, slots=True)
class Grid:
    """How a weight is put on an integer grid; `scale_dtype` is the dtype that scales are stored in."""

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype
    extend_zero: bool = True
    sym_scale: str = "full"
    mse_clip: bool = False

    @property
    def levels(self) -> int:
        """Largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    def at(self, params: Mapping[str, Any] | None) -> Grid:
        """This grid at the width of a linear's format params, where the layout decided them."""
        return self if params is None else replace(self, bits=int(params["bits"]))

    def size(self, inputs: int) -> int:
        """Channels per group for a linear of `inputs` channels."""
        return inputs if self.group_size == -1 else self.group_size


def check_grid(bits: int, group_size: int, sym_scale: str) -> None:
    """Validate the options that every integer method shares."""
    if bits not in (2, 3, 4, 8):
        raise CompressError(f"--bits {bits} is not supported", hint="use 2, 3, 4 or 8", usage=True)
    if group_size != -1 and (group_size < 1):
        raise CompressError(
            f"--group-size {group_size} is not a group", hint="use a positive size, or -1 for one per row", usage=True
        )
    if sym_scale not in SYM_SCALES:
        raise CompressError(f"--sym-scale {sym_scale!r} is unknown", hint=f"use one of {', '.join(SYM_SCALES)}", usage=True)


def check_groups(name: str, inputs: int, group_size: int) -> None:
    """Refuse a linear whose inputs do not split into groups."""
    if group_size != -1 and inputs % group_size:
        fits = [g for g in (128, 96, 64, 48, 32, 16) if inputs % g == 0]
        hint = f"use --group-size {fits[0]}, or " if fits else "use --group-size -1, or "
        raise CompressError(
            f"{name}: {inputs} inputs cannot be split into groups of {group_size}",
            hint=f"{hint}--ignore 're:.*{name.rsplit('.', 1)[-1]}'",
            usage=True,
        )


def _storage(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scale as it will be read back, fp32. Bounded below, so that an all-zero group is harmless.

    Asymmetric 8-bit scales are rounded up: rounded down, a 16-bit scale would cut up to 1.4 steps off the range.
    """
    least = 1e-5 if grid.scale_dtype == torch.float16 else 1e-10
    scale = scale.clamp(min=least)
    stored = scale.to(grid.scale_dtype)
    if grid.bits == 8 and not grid.symmetric and grid.scale_dtype != torch.float32:
        low = stored.float() < scale
        stored = torch.where(low, torch.nextafter(stored, torch.full_like(stored, torch.inf)), stored)
    return stored.float()


def fit_range(lo: torch.Tensor, hi: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), both fp32 of the shape of `lo` and `hi`, the least and the greatest value of each group."""
    if grid.symmetric:
        most = torch.maximum(hi.abs(), lo.abs())
        half = grid.levels / 2 if grid.sym_scale == "full" else (1 << (grid.bits - 1)) - 1
        scale = _storage(most / half, grid)
        return scale, torch.full_like(scale, float(1 << (grid.bits - 1)))
    if grid.extend_zero:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = _storage((hi - lo) / grid.levels, grid)
    return scale, torch.round(-lo / scale).clamp_(0, grid.levels)


def ranges(lo: torch.Tensor, hi: torch.Tensor, grid: Grid) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`fit_range`, and for asymmetric grids the same scale with the zero-point rounded the other way."""
    scale, zero = fit_range(lo, hi, grid)
    if grid.symmetric or not grid.extend_zero:
        return [(scale, zero)]
    exact = -lo.clamp(max=0) / scale
    other = torch.where(exact > zero, zero + 1, zero - 1).clamp_(0, grid.levels)
    return [(scale, zero), (scale, other)]


def _round(v: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes as fp32 for v (…, G, g) with scale and zero (…, G)."""
    return (v / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, grid.levels)


def fit(W: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) of W (O, I), both fp32 (O, G)."""
    v = W.view(W.shape[0], -1, grid.size(W.shape[1]))
    lo, hi = v.amin(-1), v.amax(-1)
    if not grid.mse_clip:
        return fit_range(lo, hi, grid)
    shrunk = (1 - i / _CLIP_GRID for i in range(_CLIP_STEPS))
    return pick_least(
        fit_range(lo, hi, grid),
        (fit_range(lo * p, hi * p, grid) for p in shrunk),
        lambda s, z: (round_to(v, s, z, grid) - v).abs_().pow_(_CLIP_NORM).sum(-1),
    )


def pick_least(
    start: tuple[torch.Tensor, torch.Tensor],
    tried: Iterable[tuple[torch.Tensor, torch.Tensor]],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Elementwise the (scale, zero) of the least loss, the first of equals; `start` where no loss is finite."""
    scale, zero = start
    best = torch.full_like(scale, torch.inf)
    for s, z in tried:
        found = loss(s, z)
        better = found < best
        best = torch.where(better, found, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def fit_weighted(W: torch.Tensor, weight: torch.Tensor, grid: Grid, steps: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), fp32 (O, G), that minimise sum_c weight_c (Q(w_c) - w_c)^2 per row and group of W (O, I).

    `weight` >= 0 is (I,) or (O, I). The range is shrunk to p of itself, p = 1, 0.95 …; asymmetric grids try the zero-point's
    both roundings.
    """
    v = W.view(W.shape[0], -1, grid.size(W.shape[1]))
    h = weight.view(v.shape if weight.dim() == 2 else v.shape[1:])
    lo, hi = v.amin(-1), v.amax(-1)
    shrunk = (1 - i / 20 for i in range(steps))
    return pick_least(
        fit_range(lo, hi, grid),
        (found for p in shrunk for found in ranges(lo * p, hi * p, grid)),
        lambda s, z: round_to(v, s, z, grid).sub_(v).square_().mul_(h).sum(-1),
    )


def decode(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Codes q (…, G, g) in fp32, which are overwritten, dequantized with scale and zero (…, G)."""
    return q.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))


def round_to(v: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """v (…, G, g) on the grid given by scale and zero (…, G), dequantized."""
    return decode(_round(v, scale, zero, grid), scale, zero)


def encode(W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (O, I), uint8."""
    v = W.view(W.shape[0], -1, grid.size(W.shape[1]))
    return _round(v, scale, zero, grid).to(torch.uint8).view(W.shape)


def fake(W: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Quantize and dequantize W (O, I), fp32."""
    scale, zero = fit(W, grid)
    v = W.view(W.shape[0], -1, grid.size(W.shape[1]))
    return round_to(v, scale, zero, grid).view(W.shape)

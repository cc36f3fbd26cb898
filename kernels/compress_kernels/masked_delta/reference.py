"""The definition of `masked_delta`: y = x W_tᵀ + bias with W_t = W0 + s_t d_t, the rows of x grouped by their task t.

d_t (O, I) is made of a shared v and one bit per weight and task: b v where bits are a mask, (2 b - 1) v where they are signs, b
v + (1 - b) v_0 where there is a second vector `low`. W_t is computed in fp32 and rounded once to x's dtype, as `compress extract`
writes it, so that a task's rows get the product of its extracted checkpoint; in bf16 that is at most 2^-9 of a weight.
Rows without a task, and tasks without a delta, are the base's bit for bit. A path may differ in the order of summation only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from compress_kernels import bits as bitpack

TILE = 1 << 20  # weights that are decoded together


@dataclass(frozen=True, slots=True)
class Shared:
    """A shared vector (O, I) as stored: bf16 values, codes with scales, or one fp32 number (1,)."""

    values: torch.Tensor  # bf16 (O, I), int32 words (O, K), or fp32 (1,)
    scale: torch.Tensor | None = None  # bf16 (O, G) beside words
    bits: int = 16
    zero: int = 0  # the code that means 0
    low: Shared | None = None  # what a bit of 0 stands for, where it is neither 0 nor -v


@dataclass(frozen=True, slots=True)
class Delta:
    """One task's bits (O, ceil(I/32)) int32, lowest bit first, and its factor."""

    mask: torch.Tensor
    scale: float


def unpack_mask(words: torch.Tensor, inputs: int) -> torch.Tensor:
    """Bits (O, I) bool of words (O, ceil(I/32)) int32."""
    return bitpack.unpack(words, 1, inputs).to(torch.bool)


def decode_shared(shared: Shared, inputs: int, rows: slice = slice(None)) -> torch.Tensor:
    """Rows of v in fp32: (R, I), or (1,) where it is a single number."""
    if shared.values.dim() == 1:
        return shared.values
    values = shared.values[rows]
    if shared.scale is None:
        return values.float()
    scale = shared.scale[rows].float()
    codes = bitpack.unpack(values, shared.bits, inputs).to(torch.float32)
    grouped = codes.view(len(codes), scale.shape[1], -1)
    return grouped.sub_(shared.zero).mul_(scale.unsqueeze(-1)).view(len(codes), inputs)


def values(shared: Shared, inputs: int, are_signs: bool, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of what the bits 0 and 1 stand for, in fp32: (R, I) or (1,) each."""
    one = decode_shared(shared, inputs, rows)
    if shared.low is not None:
        return decode_shared(shared.low, inputs, rows), one
    return (-one if are_signs else torch.zeros_like(one)), one


def decode(delta: Delta, pair: tuple[torch.Tensor, torch.Tensor], inputs: int, rows: slice = slice(None)) -> torch.Tensor:
    """s d (R, I) of the rows in fp32, from those rows of `values`."""
    return torch.where(unpack_mask(delta.mask[rows], inputs), pair[1], pair[0]).mul_(delta.scale)


def groups(tasks: Sequence[str | None], count: int) -> dict[str | None, list[int]]:
    """Rows of each task. `count` may be a multiple of the tasks: then row i belongs to task i // (count / tasks)."""
    if not tasks or count % len(tasks):
        raise ValueError(f"{count} rows cannot be shared out over {len(tasks)} tasks")
    each = count // len(tasks)
    found: dict[str | None, list[int]] = {}
    for row in range(count):
        found.setdefault(tasks[row // each], []).append(row)
    return found


def linear(
    x: torch.Tensor, W0: torch.Tensor, bias: torch.Tensor | None, shared: Shared, deltas: Mapping[str, Delta], are_signs: bool,
    tasks: Sequence[str | None],
) -> torch.Tensor:  # fmt: skip
    """x (B, …, I) with one task per row, or per equal run of rows -> (B, …, O) in x's dtype. W0 (O, I) has x's dtype."""
    y = F.linear(x, W0, bias)
    O, I = W0.shape
    owned = {t: rows for t, rows in groups(tasks, len(x)).items() if t in deltas}
    parts = {t: x[rows] for t, rows in owned.items()}
    step = max(1, TILE // I)
    for start in range(0, O if owned else 0, step):
        tile = slice(start, min(start + step, O))
        pair = values(shared, I, are_signs, tile)
        own = None if bias is None else bias[tile]
        for task, rows in owned.items():
            assert task is not None
            W = (decode(deltas[task], pair, I, tile) + W0[tile]).to(x.dtype)
            y[rows, ..., tile] = F.linear(parts[task], W, own)
    return y

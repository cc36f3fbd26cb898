"""What the bundle methods share: task vectors, masks, the shared vector and how it is stored, scales and errors.

Of one tensor, tau (T, R, C) are the deltas theta_t - theta_0 of T fine-tunes, v (R, C) the shared vector, and the
reconstruction of task t is theta_0 + s_t d_t with

    d_t = b_t v                    bits are a mask, b in {0, 1}
    d_t = (2 b_t - 1) v            bits are signs
    d_t = b_t v_1 + (1 - b_t) v_0  bits choose between two shared vectors, v (2, R, C)

Everything here works on rows: a tensor may come in pieces. What is needed of the whole tensor is a `Sums`, which adds up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.errors import CompressError, nearest
from compress.methods import _quantizer
from compress.methods._quantizer import Grid

SHARED = ("bf16", "int8", "int4")  # how a shared vector is stored
CONSTANT = "constant"  # one fp32 number per tensor
GROUPS = (128, 96, 64, 48, 32)  # inputs per int4 scale: the first that divides a row, else the whole row
LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # the paper's grid and two more: in l2 the best is always 1
_CLIPS = 6  # shrunk ranges tried for an int4 group


@dataclass(frozen=True, slots=True)
class Sums:
    """What is known of one tensor in each of T tasks, fp64: norms of the deltas and of what the bits make of v."""

    count: int  # elements
    tau1: tuple[float, ...]  # sum |tau|
    tau2: tuple[float, ...]  # sum tau²
    dot: tuple[float, ...] = ()  # sum d tau
    d1: tuple[float, ...] = ()  # sum |d|
    d2: tuple[float, ...] = ()  # sum d²
    ones: tuple[int, ...] = ()  # bits that are set

    def __add__(self, other: Sums) -> Sums:
        def add(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
            return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else tuple(a or b)

        return Sums(
            self.count + other.count, add(self.tau1, other.tau1), add(self.tau2, other.tau2), add(self.dot, other.dot),
            add(self.d1, other.d1), add(self.d2, other.d2), tuple(int(n) for n in add(self.ones, other.ones)),
        )  # fmt: skip

    def rms(self) -> list[float]:
        """Root mean square of each task's deltas."""
        return [math.sqrt(x / max(self.count, 1)) for x in self.tau2]

    def mean_abs(self) -> list[float]:
        """Mean magnitude of each task's deltas."""
        return [x / max(self.count, 1) for x in self.tau1]

    def errors(self, scales: Sequence[float]) -> list[float]:
        """|tau - s d|² / |tau|² of each task; 0 where there is no delta."""
        found = []
        for s, t2, dot, d2 in zip(scales, self.tau2, self.dot, self.d2, strict=True):
            found.append(max(0.0, t2 - 2 * s * dot + s * s * d2) / t2 if t2 > 0 else 0.0)
        return found


def _sum(x: torch.Tensor) -> float:
    return float(x.sum(dtype=torch.float64))


def moments(tau: torch.Tensor) -> Sums:
    """The sums of a piece of the deltas (T, R, C) alone."""
    ones = [_sum(t.abs()) for t in tau], [_sum(t.square()) for t in tau]
    return Sums(tau[0].numel(), tuple(ones[0]), tuple(ones[1]))


def products(tau: Sequence[torch.Tensor], d: Sequence[torch.Tensor], bits: Sequence[torch.Tensor]) -> Sums:
    """The sums of a piece: deltas, what the bits make of v, and the bits, each a row of T tensors (R, C)."""
    return Sums(
        tau[0].numel(),
        tuple(_sum(t.abs()) for t in tau), tuple(_sum(t.square()) for t in tau),
        tuple(_sum(a * b) for a, b in zip(d, tau, strict=True)), tuple(_sum(a.abs()) for a in d),
        tuple(_sum(a.square()) for a in d), tuple(int(b.sum()) for b in bits),
    )  # fmt: skip


# -- masks -----------------------------------------------------------------------------------------------------------------


def tall(tau: torch.Tensor, v: torch.Tensor, lam: float) -> torch.Tensor:
    """TALL mask 1[|tau| > lam |v - tau|] of one task, strictly: bool, of tau's shape (tall_masks `generate_task_masks`)."""
    return tau.abs() > (v - tau).abs_().mul_(lam)


def signs(tau: torch.Tensor) -> torch.Tensor:
    """1[tau >= 0], bool: zero counts as +1 (BitDelta `diff.py`)."""
    return tau >= 0


def apply(bits: torch.Tensor, v: torch.Tensor, are_signs: bool) -> torch.Tensor:
    """d (R, C) in v's dtype; v is (R, C), a single number, or (2, R, C): what the bits 0 and 1 stand for."""
    if v.dim() == 3:
        return torch.where(bits, v[1], v[0])
    if are_signs:
        return torch.where(bits, v, -v)
    return torch.where(bits, v, torch.zeros((), dtype=v.dtype, device=v.device))


# -- shared vectors --------------------------------------------------------------------------------------------------------


def trimmed(tau: torch.Tensor, thresholds: Sequence[float]) -> torch.Tensor:
    """tau (T, R, C) with everything below each task's threshold set to 0; ties stay (TIES, `topk_values_mask`)."""
    limits = torch.tensor(thresholds, dtype=tau.dtype, device=tau.device).view(-1, *[1] * (tau.dim() - 1))
    return tau * (tau.abs() >= limits)


def elected(tau: torch.Tensor, majority: float) -> torch.Tensor:
    """The sign of the sum over tasks; where that is 0 the majority's (TIES, `resolve_sign`)."""
    sign = tau.sum(0).sign()
    return torch.where(sign == 0, torch.full_like(sign, majority), sign)


def disjoint(tau: torch.Tensor, sign: torch.Tensor, mean: bool) -> torch.Tensor:
    """Sum or mean over the tasks that agree with the elected sign (TIES, `disjoint_merge`); a sign of 0 takes negative values."""
    agree = torch.where(sign > 0, tau > 0, tau < 0)
    total = (tau * agree).sum(0)
    return total / agree.sum(0).clamp(min=1) if mean else total


def unified(tau: torch.Tensor) -> torch.Tensor:
    """EMR's vector: the sign of the mean, the largest magnitude among the tasks that have it."""
    sigma = tau.sum(0).sign()
    return (tau * sigma).amax(0).clamp_(min=0).mul_(sigma)


def magnitude(tau: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
    """Mean over tasks of |tau_t| / s_t (R, C); tasks with s_t = 0 are left out."""
    kept = [(t, s) for t, s in zip(tau, scales, strict=True) if s > 0]
    total = torch.zeros_like(tau[0])
    for t, s in kept:
        total += t.abs() / s
    return total / max(len(kept), 1)


def _descending(u: torch.Tensor) -> list[torch.Tensor]:
    """T tensors with the values of u (T, …) in falling order: odd-even transposition, faster than a sort of so few."""
    rows = [x.clone() for x in u]
    for turn in range(len(rows)):
        for i in range(turn % 2, len(rows) - 1, 2):
            high = torch.maximum(rows[i], rows[i + 1])
            torch.minimum(rows[i], rows[i + 1], out=rows[i + 1])
            rows[i] = high
    return rows


def refined(u: torch.Tensor) -> torch.Tensor:
    """The v (R, C) of the least sum over t of |u_t - m_t v|² with free masks, u (T, R, C): exactly, without alternating.

    For v > 0 the best masks are those with u_t > v / 2, so the active tasks are the k largest values for some k, and v is their
    mean; k of them gain (sum)² / k over shipping nothing. So v is the best of 2 T candidates: k of the largest or the smallest.
    """
    rows = _descending(u)
    best = torch.zeros_like(u[0])
    v = torch.zeros_like(u[0])
    for side in (rows, [-x for x in reversed(rows)]):
        sign = 1.0 if side is rows else -1.0
        total = torch.zeros_like(best)
        for k, x in enumerate(side, 1):
            total = total + x.clamp(min=0)
            gain = total.square() / k
            better = gain > best
            best = torch.where(better, gain, best)
            v = torch.where(better, total * (sign / k), v)
    return v


def levels(u: torch.Tensor) -> torch.Tensor:
    """The two vectors (2, R, C) of the least sum over t of |u_t - v_b|², b free in {0, 1}: two means of T numbers, exactly.

    The best parts of numbers on a line are a run of the largest and the rest, so there are T candidates.
    """
    rows = _descending(u)
    total = torch.stack(rows).sum(0)
    count = len(rows)
    best = total.square() / count
    low = high = total / count
    part = torch.zeros_like(total)
    for k, x in enumerate(rows[:-1], 1):
        part = part + x
        rest = total - part
        gain = part.square() / k + rest.square() / (count - k)
        better = gain > best
        best = torch.where(better, gain, best)
        high, low = torch.where(better, part / k, high), torch.where(better, rest / (count - k), low)
    return torch.stack([low, high])


# -- how v is stored -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows of a shared vector as they are stored, and what they mean."""

    v: torch.Tensor  # fp32 (R, C), or (1,): what is read back
    values: torch.Tensor | None = None  # bf16 (R, C)
    codes: torch.Tensor | None = None  # uint8 (R, C)
    scale: torch.Tensor | None = None  # bf16 (R, G)


def check_shared(kind: str) -> None:
    """Refuse an unknown way to store a shared vector."""
    if kind not in SHARED:
        raise CompressError(f"--shared {kind!r} is unknown", hint=nearest(kind, SHARED), usage=True)


def group_size(kind: str, columns: int) -> int:
    """Columns per scale; -1: a whole row."""
    return next((g for g in GROUPS if columns % g == 0), -1) if kind == "int4" else -1


def store(v: torch.Tensor, kind: str, signed: bool) -> Stored:
    """Round v (R, C) fp32 to what `kind` holds. `signed` False: no value is negative, and codes start at 0.

    int4 tries shrunk ranges for each group. Scales are bfloat16, whose range holds the smallest deltas; they are rounded before
    the codes are computed.
    """
    if kind == "bf16":
        values = v.to(torch.bfloat16)
        return Stored(values.float(), values)
    bits = int(kind.removeprefix("int"))
    grid = Grid(bits, group_size(kind, v.shape[1]), signed, torch.bfloat16)
    if bits == 4:
        scale, zero = _quantizer.fit_weighted(v, torch.ones(v.shape[1], device=v.device), grid, _CLIPS)
    else:
        scale, zero = _quantizer.fit(v, grid)
    zero = torch.full_like(zero, float(1 << (bits - 1)) if signed else 0.0)
    codes = _quantizer.encode(v, scale, zero, grid)
    back = _quantizer.decode(codes.float().view(len(v), scale.shape[1], -1), scale, zero).view(v.shape)
    return Stored(back, None, codes, scale.to(torch.bfloat16))


# -- scales ----------------------------------------------------------------------------------------------------------------


def half(x: float) -> float:
    """x as the fp16 that is stored."""
    return float(torch.tensor(x, dtype=torch.float64).to(torch.float16))


def least_squares(sums: Sums) -> list[float]:
    """s_t of the least |tau_t - s_t d_t|² per task, as stored; 1 where d is 0. Never worse than 1 but for the rounding."""
    return [half(dot / d2) if d2 > 0 else 1.0 for dot, d2 in zip(sums.dot, sums.d2, strict=True)]


# -- exact thresholds over a whole model -----------------------------------------------------------------------------------


def bins(values: torch.Tensor, prefix: int | None = None) -> torch.Tensor:
    """Counts (65536,) of the upper 16 bits of |values|, fp32; with a prefix, of the lower 16 bits of those that have it above."""
    words = values.abs().contiguous().view(torch.int32).flatten()
    words = words >> 16 if prefix is None else words[(words >> 16) == prefix] & 0xFFFF
    return torch.bincount(words.to(torch.int64), minlength=1 << 16).cpu()


def at_rank(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the element of 0-based `rank` in rising order, and its rank inside the bin."""
    ends = counts.cumsum(0)
    index = int(torch.searchsorted(ends, rank, right=True))
    return index, rank - int(ends[index] - counts[index])


def from_bins(high: int, low: int) -> float:
    """The fp32 number of two halves of its bits."""
    return float(torch.tensor([(high << 16) | low], dtype=torch.int32).view(torch.float32))


def cut(total: int, density: float) -> int:
    """0-based rank of TIES' threshold among |tau| of one task: floor(total density) + 1 values are at or above it.

    tall_masks `topk_values_mask` takes the (total - floor(total density))-th smallest and keeps what is >= it.
    """
    return max(total - int(total * density) - 1, 0)

"""The definition of `hadamard`: y = act(x) (F x S) / sqrt(n), F a small Hadamard matrix, S Sylvester's of the rest."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_LARGEST = 64  # Sylvester factor that is multiplied as a matrix


def power(n: int, base: torch.Tensor | None) -> int:
    """The order of S for n = order of `base` times it. Raises ValueError where that is no power of two."""
    order = 1 if base is None else base.shape[0]
    left, rest = divmod(n, order)
    if n < 1 or rest or left & (left - 1):
        what = "no power of two" if base is None else f"{order} times no power of two"
        raise ValueError(f"no Hadamard matrix of order {n}: it is {what}")
    return left


def sylvester(order: int) -> torch.Tensor:
    """(order, order) of ±1, fp32: element (i, j) is negative where i and j share an odd number of bits."""
    i = torch.arange(order)
    shared = i[:, None] & i[None, :]
    for half in (16, 8, 4, 2, 1):
        shared = shared ^ (shared >> half)
    return 1.0 - 2.0 * (shared & 1)


def activated(x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """silu(x) · up in x's dtype where `up` is given, as a gated layer computes it; else x."""
    return x if up is None else F.silu(x) * up


def transform(x: torch.Tensor, base: torch.Tensor | None = None, up: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., n) -> (..., n) in its dtype, summed in fp32 (fp64 for fp64). base (k, k) of ±1 with base baseᵀ = k I; up (..., n)."""
    n = x.shape[-1]
    left = power(n, base)
    factors = [] if base is None else [base]
    while left > 1:
        factors.append(sylvester(min(left, _LARGEST)))
        left //= min(left, _LARGEST)
    y = activated(x, up)
    y = y.reshape(-1, *(f.shape[0] for f in factors), 1).to(torch.promote_types(x.dtype, torch.float32))
    for axis, factor in enumerate(factors, 1):
        y = torch.movedim(torch.tensordot(y, factor.to(y), dims=([axis], [0])), -1, axis)
    return y.div(math.sqrt(n)).to(x.dtype).view(x.shape)

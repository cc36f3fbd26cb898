"""Orthogonal matrices of any order, as Kronecker products of small Hadamard factors.

    H Hᵀ = n I, entries ±1:   order 2 Sylvester;   q + 1 Paley I, prime q = 3 mod 4;   2 (q + 1) Paley II, prime q = 1 mod 4

(Paley, J. Math. Phys. 12, 1933.) `Rotation` is diag(signs) (F1 x F2 x …) / sqrt(n) as in spcl/QuaRot `hadamard_utils.py:
random_hadamard_matrix`, whose tables this replaces; orders without a construction get a random orthogonal matrix.
"""

from __future__ import annotations

import math

import torch

_LARGEST = 2048  # factor that is built dense
_SYLVESTER = 64
_PIECE = 1 << 20  # elements rotated at a time


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _character(q: int) -> torch.Tensor:
    """J (q, q) with J_ij = chi(i - j): 1 where the difference is a non-zero square mod q, -1 where it is none."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(1, q) ** 2 % q] = 1.0
    chi[0] = 0.0
    i = torch.arange(q)
    return chi[(i[:, None] - i[None, :]) % q]


def _paley_one(q: int) -> torch.Tensor:
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1.0, -1.0, _character(q)
    return S + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> torch.Tensor:
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1.0, 1.0, _character(q)
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(S, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)


def _base(order: int) -> torch.Tensor | None:
    """A Hadamard matrix of this order by one of Paley's constructions."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _prime(order - 1):
        return _paley_one(order - 1)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _prime(order // 2 - 1):
        return _paley_two(order // 2 - 1)
    return None


def _sylvester(order: int) -> torch.Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < order:
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return H


def factors(n: int) -> list[torch.Tensor] | None:
    """Hadamard matrices (fp64) whose Kronecker product has order n, the odd part in the first; None if no construction fits."""
    if n < 1:
        raise ValueError(f"no matrix of order {n}")
    power = n & -n
    odd, out = n // power, []
    if odd > 1:
        orders = (odd * 2**k for k in range(2, power.bit_length()))
        found = next(((k, H) for k in orders if k <= _LARGEST and (H := _base(k)) is not None), None)
        if found is None:
            return None
        out.append(found[1])
        power = n // found[0]
    while power > 1:
        step = min(power, _SYLVESTER)
        out.append(_sylvester(step))
        power //= step
    return out or [torch.ones(1, 1, dtype=torch.float64)]


class Rotation:
    """An orthogonal n x n matrix Q in fp64 that is applied factor by factor."""

    def __init__(self, n: int, seed: int | None = None, random: bool = False) -> None:
        """`seed` draws the signs (None: no signs); `random` asks for a random orthogonal matrix instead of a Hadamard one."""
        self.n = n
        generator = torch.Generator().manual_seed(seed or 0)
        found = None if random else factors(n)
        self.hadamard = found is not None
        if found is None:
            Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
            found = [Q * R.diagonal().sign() * math.sqrt(n)]
        self._factors = found
        self._signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1 if seed is not None else None

    def right(self, x: torch.Tensor) -> torch.Tensor:
        """x Q for x (…, n), fp64."""
        rows = x.reshape(-1, self.n)
        out = torch.empty(rows.shape, dtype=torch.float64)
        for part, to in zip(rows.split(max(1, _PIECE // self.n)), out.split(max(1, _PIECE // self.n)), strict=True):
            to.copy_(self._apply(part.double()))
        return out.view(x.shape)

    def _apply(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self._signs is None else x * self._signs
        y = y.reshape(-1, *(f.shape[0] for f in self._factors))
        for axis, f in enumerate(self._factors, 1):
            y = torch.movedim(torch.tensordot(y, f, dims=([axis], [0])), -1, axis)
        return y.reshape(x.shape).div_(math.sqrt(self.n))

    def left(self, W: torch.Tensor) -> torch.Tensor:
        """Qᵀ W for W (n, …), fp64."""
        return torch.movedim(self.right(torch.movedim(W, 0, -1)), -1, 0).contiguous()

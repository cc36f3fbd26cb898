"""Hadamard matrices, H Hᵀ = n I with entries ±1, of every order that a model asks for: constructions, and one table.

    order 2        Sylvester
    q + 1          Paley I, prime q = 3 mod 4           (12, 20, 28 …)
    2 (q + 1)      Paley II, prime q = 1 mod 4
    4 w            Williamson: four symmetric circulants A, B, C, D of order w with A² + B² + C² + D² = 4 w I (172)

(Paley, J. Math. Phys. 12, 1933; Williamson, Duke Math. J. 11, 1944.) A matrix of order n is the Kronecker product of `factors(n)`.
"""

from __future__ import annotations

import math

import torch

_LARGEST = 2048  # factor that is built dense
_SYLVESTER = 64

# w -> a subgroup of the units mod w, by which the circulants' first rows do not change, and for each of the four the negative
# classes of non-zero positions, as bits in the order of the classes' smallest members. Found by a search over such rows.
_WILLIAMSON = {43: ((1, 6, 36), (0b0000111, 0b0101110, 0b0110100, 0b1100010))}


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


def _williamson(w: int) -> torch.Tensor:
    units, negative = _WILLIAMSON[w]
    classes: list[set[int]] = []
    for i in range(1, w):
        if not any(i in c for c in classes):
            classes.append({sign * i * u % w for u in units for sign in (1, -1)})
    i = torch.arange(w)
    A, B, C, D = (torch.ones(w, dtype=torch.float64) for _ in range(4))
    for row, bits in zip((A, B, C, D), negative, strict=True):
        for number, members in enumerate(classes):
            if bits >> number & 1:
                row[list(members)] = -1.0
    A, B, C, D = (row[(i[None, :] - i[:, None]) % w] for row in (A, B, C, D))
    rows = ((A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A))
    return torch.cat([torch.cat(row, 1) for row in rows])


def construct(order: int) -> torch.Tensor | None:
    """A Hadamard matrix (order, order), fp64, that is no product of smaller ones; None where no construction fits."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _prime(order - 1):
        return _paley_one(order - 1)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _prime(order // 2 - 1):
        return _paley_two(order // 2 - 1)
    return _williamson(order // 4) if order % 4 == 0 and order // 4 in _WILLIAMSON else None


def _sylvester(order: int) -> torch.Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < order:
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return H


def _odd_part(n: int) -> tuple[int, torch.Tensor | None] | None:
    """The factor of n that has its odd part, and its matrix: (1, None) for a power of two, None if no construction fits."""
    power = n & -n
    odd = n // power
    if odd == 1:
        return 1, None
    orders = (odd * 2**k for k in range(2, power.bit_length()))
    return next(((k, H) for k in orders if k <= _LARGEST and (H := construct(k)) is not None), None)


def base(n: int) -> torch.Tensor | None:
    """What `transform` takes as `base` for rows of n elements: (k, k) int8, None for a power of two.

    Raises ValueError where no construction fits n.
    """
    found = _odd_part(n) if n > 0 else None
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {n}: no construction has its odd part")
    return None if found[1] is None else found[1].to(torch.int8)


def factors(n: int) -> list[torch.Tensor] | None:
    """Hadamard matrices (fp64) whose Kronecker product has order n, the odd part in the first; None if no construction fits."""
    if n < 1:
        raise ValueError(f"no matrix of order {n}")
    found = _odd_part(n)
    if found is None:
        return None
    order, H = found
    out, power = [] if H is None else [H], n // order
    while power > 1:
        step = min(power, _SYLVESTER)
        out.append(_sylvester(step))
        power //= step
    return out or [torch.ones(1, 1, dtype=torch.float64)]

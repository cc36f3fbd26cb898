"""Orthogonal matrices of any order, as Kronecker products of small Hadamard factors (`compress_kernels.hadamard.matrices`).

`Rotation` is diag(signs) (F1 x F2 x …) / sqrt(n) as in spcl/QuaRot `hadamard_utils.py: random_hadamard_matrix`, whose tables
this replaces; orders without a construction get a random orthogonal matrix.
"""

from __future__ import annotations

import math

import torch
from compress_kernels.hadamard.matrices import factors

_PIECE = 1 << 20  # elements rotated at a time


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

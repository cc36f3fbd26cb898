"""Streaming statistics of a linear's input: `update(x)` per batch, then read. One object per *input*, shared by its readers."""

from __future__ import annotations

import torch

from compress.types import Stat

_SLICES = 4  # columns of the second moments that are added up together

class InputStats:
    """Statistics of one input of I channels over T tokens, in fp32.

    GRAM keeps either X (T, I) or the sum of x xᵀ (I, I), whichever is smaller: both give `quadratic` exactly.
    """

    def __init__(self, want: Stat, inputs: int, tokens: int, group: int) -> None:
        self.tokens = 0
        self._want = want
        self._group = group
        self._abs = torch.zeros(0)
        self._energy = torch.zeros(0)
        self._blocks: torch.Tensor | None = None  # (G, g, g)
        self._H: torch.Tensor | None = None  # (I, I)
        self._mirrored = True
        self._X: list[torch.Tensor] | None = [] if Stat.GRAM in want and tokens <= inputs else None

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add inputs (…, I); `weight` (…) multiplies each token's share in the second moments."""
        x = x.reshape(-1, x.shape[-1]).float()
        if weight is not None:
            x = x * weight.reshape(-1, 1).to(x).sqrt()
        self.tokens += x.shape[0]
        if Stat.ABSMEAN in self._want:
            total = x.abs().sum(0, dtype=torch.float64)
            self._abs = total if self._abs.numel() == 0 else self._abs + total
        if Stat.ENERGY in self._want:
            energy = x.square().sum(0, dtype=torch.float64)
            self._energy = energy if self._energy.numel() == 0 else self._energy + energy
        if self._X is not None:
            self._X.append(x.clone())
        elif Stat.GRAM in self._want:
            if self._H is None:
                self._H = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self._add(x)
        elif Stat.GROUP_GRAM in self._want:
            part = x.view(x.shape[0], -1, self._group).transpose(0, 1)  # (G, T, g)
            if self._blocks is None:
                self._blocks = torch.zeros(part.shape[0], self._group, self._group, device=x.device)
            self._blocks.baddbmm_(part.transpose(1, 2), part)

    def _add(self, x: torch.Tensor) -> None:
        """Add xᵀ x to the lower triangle, and a little more: a product of four slices instead of the whole, 5/8 of the work."""
        assert self._H is not None
        step = -(-x.shape[1] // _SLICES)
        for start in range(0, x.shape[1], step):
            self._H[start:, start : start + step].addmm_(x[:, start:].T, x[:, start : start + step])
        self._mirrored = False

    def _whole(self) -> torch.Tensor:
        """The second moments' sum (I, I), its upper triangle made from the lower one."""
        assert self._H is not None, "GRAM was not collected"
        if not self._mirrored:
            step = -(-self._H.shape[0] // _SLICES)
            for start in range(0, self._H.shape[0], step):
                self._H[start : start + step, start + step :] = self._H[start + step :, start : start + step].T
            self._mirrored = True
        return self._H

    def absmean(self) -> torch.Tensor:
        """Mean |x| per channel (I,), fp32."""
        return (self._abs / self.tokens).float()

    def energy(self) -> torch.Tensor:
        """Mean over tokens of x² per channel (I,), fp32."""
        return (self._energy / self.tokens).float()

    def quadratic(self, D: torch.Tensor) -> float:
        """Mean over tokens of |D x|^2 for D (O, I)."""
        if self._X is not None:
            return sum(float((x @ D.T).square().sum(dtype=torch.float64)) for x in self._X) / self.tokens
        return float(((D @ self._whole()) * D).sum(dtype=torch.float64)) / self.tokens

    def hessian(self) -> torch.Tensor:
        """Mean over tokens of x xᵀ, (I, I), in memory of its own: GPTQ's Hessian up to a factor, which changes nothing."""
        if self._X is not None:
            H = torch.zeros(self._X[0].shape[1], self._X[0].shape[1], device=self._X[0].device)
            for x in self._X:
                H.addmm_(x.T, x)
            return H.div_(self.tokens)
        return self._whole() / self.tokens

    def group_gram(self) -> torch.Tensor:
        """Mean over tokens of x xᵀ inside each group of channels, (G, g, g)."""
        if self._X is not None:
            total = torch.zeros(self._X[0].shape[1] // self._group, self._group, self._group, device=self._X[0].device)
            for x in self._X:
                part = x.view(x.shape[0], -1, self._group).transpose(0, 1)
                total.baddbmm_(part.transpose(1, 2), part)
        elif self._H is not None:
            G = self._H.shape[0] // self._group
            grid = self._whole().view(G, self._group, G, self._group)
            total = grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        else:
            assert self._blocks is not None, "GROUP_GRAM was not collected"
            total = self._blocks
        return total / self.tokens

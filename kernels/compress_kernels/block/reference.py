"""The definition of a decoding step: one token of every row through a Llama-like model's blocks and head, in fp32.

x (B, D) becomes x + o(attention(rope(q(n)), rope(k(n)), v(n))) with n = norm_in(x), and then x + down(silu(gate(n)) up(n)) with
n = norm_mid(x). q and k of a head have norms of their own in some models (Qwen3). Keys and values are rounded to the cache's dtype
before use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from compress_kernels.armor import cpu as armor
from compress_kernels.armor.reference import blocks
from compress_kernels.int_grouped import cpu as int_grouped
from compress_kernels.lowrank_sparse import cpu as factors
from compress_kernels.masked_delta import single
from compress_kernels.native import masked

Weight: TypeAlias = int_grouped.Weight | masked.Weight | factors.Weight | armor.Weight | single.Weight | torch.Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x Wᵀ + bias, W (O, I) in a CPU kernel's layout or dense, fp32 in and out.

    Masked weights and deltas round x and y to `dtype`, and so does ARMOR's core with what its `pre` gives.
    """

    weight: Weight
    bias: torch.Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        O, I = (self.weight.core if isinstance(self.weight, armor.Weight) else self.weight).shape
        return O, I

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, I) fp32 -> (B, O) fp32."""
        if isinstance(self.weight, torch.Tensor):
            y = F.linear(x, self.weight.float())
        elif isinstance(self.weight, masked.Weight):
            y = masked.linear(x.to(self.dtype), self.weight).float()
        elif isinstance(self.weight, single.Weight):
            y = single.linear(x.to(self.dtype), self.weight).float()
        elif isinstance(self.weight, armor.Weight):
            inner = masked.linear(blocks(x, self.weight.pre.float()).to(self.dtype), self.weight.core)
            y = blocks(inner.float(), self.weight.post.float())
        elif isinstance(self.weight, factors.Weight):
            y = _factors(x, self.weight)
        else:
            y = int_grouped.linear(x, self.weight)
        return y if self.bias is None else y + self.bias.float()


def _factors(x: torch.Tensor, w: factors.Weight) -> torch.Tensor:
    """U [g f(A x_first) ; (1 - g) x_last], f and g where the weight has them; columns beyond a factor's own are 0."""
    first, last, g = w.job.first, w.job.last, w.gamma
    x = x if w.order is None else x[:, w.order.long()]
    direct = x[:, first : first + last] * (1 if g is None else 1 - g)
    if w.A is not None:
        h = _factor(x[:, :first], w.A)
        h = F.silu(h) if w.silu else h
        direct = torch.cat([h if g is None else h * g, direct], 1)
    return _factor(direct, w.U)


def _factor(x: torch.Tensor, W: int_grouped.Weight | torch.Tensor) -> torch.Tensor:
    if isinstance(W, torch.Tensor):
        return F.linear(x, W.float())
    return int_grouped.linear(F.pad(x, (0, W.shape[1] - x.shape[1])), W)


@dataclass(frozen=True, slots=True)
class Block:
    """One block's weights."""

    norm_in: torch.Tensor  # (D,)
    norm_mid: torch.Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    norm_q: torch.Tensor | None = None  # (head_dim,)
    norm_k: torch.Tensor | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All of them."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


@dataclass(frozen=True, slots=True)
class Shape:
    """What all blocks have in common."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float  # of the norms
    scale: float  # of the scores


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (…, n) by the root of its mean square, times weight (n,)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, head_dim): element i of the first half and of the second turned by the angle of cos and sin (B, head_dim/2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, scale: float) -> torch.Tensor:
    """q (B, H, d) over keys and values (B, H_kv, T, d), from place first (B,) on -> (B, H, d)."""
    repeats = q.shape[1] // keys.shape[1]
    k, v = (t.float().repeat_interleave(repeats, 1) for t in (keys, values))
    scores = (k @ q.unsqueeze(-1)).squeeze(-1) * scale
    hidden = torch.arange(k.shape[2]) < first[:, None, None]
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1).unsqueeze(2) @ v).squeeze(2)


def step(
    x: torch.Tensor, blocks: Sequence[Block], final: torch.Tensor, head: Linear, shape: Shape, cache: Sequence[torch.Tensor],
    slot: int, first: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x (B, D) -> logits (B, V) fp32; writes place `slot` of each block's cache (2, B, H_kv, capacity, head_dim).

    A row attends to the places first (B,) … slot; cos and sin (B, head_dim/2) are its position's; `final` is the last norm's.
    """
    B, d = len(x), shape.head_dim
    x = x.float()
    for block, kept in zip(blocks, cache, strict=True):
        n = norm(x, block.norm_in, shape.eps)
        q, k, v = block.q(n).view(B, -1, d), block.k(n).view(B, -1, d), block.v(n).view(B, -1, d)
        if block.norm_q is not None and block.norm_k is not None:
            q, k = norm(q, block.norm_q, shape.eps), norm(k, block.norm_k, shape.eps)
        kept[0, :, :, slot], kept[1, :, :, slot] = rotate(k, cos, sin), v
        mixed = attention(rotate(q, cos, sin), kept[0, :, :, : slot + 1], kept[1, :, :, : slot + 1], first, shape.scale)
        x = x + block.o(mixed.reshape(B, -1))
        n = norm(x, block.norm_mid, shape.eps)
        x = x + block.down(F.silu(block.gate(n)) * block.up(n))
    return head(norm(x, final, shape.eps))

"""The definition of `int_grouped`: the dense weight (O, I), then `F.linear`. Every path is tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress_kernels import bits as bitpack


def dequantize(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    bits: int,
    shape: tuple[int, int],
) -> torch.Tensor:
    """The dense weight (O, I) in fp32, (q - z) * scale, from words (O, K), scale (O, G) and zeros packed along O."""
    O, I = shape
    G = weight_scale.shape[1]
    q = bitpack.unpack(weight_packed, bits, I).float().view(O, G, I // G)
    if weight_zero_point is None:
        q -= 1 << (bits - 1)
    else:
        q -= zeros(weight_zero_point, bits, O).float().unsqueeze(-1)
    return (q * weight_scale.float().unsqueeze(-1)).view(O, I)


def zeros(weight_zero_point: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Zero points (O, G) uint8 from the artifact's words (ceil(O*bits/32), G)."""
    return bitpack.unpack(weight_zero_point.T.contiguous(), bits, rows).T.contiguous()


def zeros_of(weight_zero_point: torch.Tensor, bits: int, index: torch.Tensor) -> torch.Tensor:
    """Zero points (N, G) uint8 of the rows index (N,), from the artifact's words."""
    start = index.to(torch.int64) * bits
    word, shift = start // 32, (start % 32).unsqueeze(1)
    low = weight_zero_point[word].to(torch.int64) & 0xFFFFFFFF
    high = weight_zero_point[(word + 1).clamp_(max=len(weight_zero_point) - 1)].to(torch.int64)  # of codes that straddle words
    return (((low | high << 32) >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    bits: int,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias, in x's dtype: W is dequantized in fp32 and then rounded to that dtype."""
    W = dequantize(weight_packed, weight_scale, weight_zero_point, bits, shape)
    return F.linear(x, W.to(x.dtype), bias)

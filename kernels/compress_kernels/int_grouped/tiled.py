"""Any device, any width: tiles of whole rows are decoded into one scratch buffer and multiplied by the BLAS.

Traffic per call: the packed words once, plus a tile that is written and read in cache; memory beyond the packed weight
is one tile. Decoding costs the same for any number of tokens, so it is amortised from a few dozen tokens on. Each tile
holds whole rows, so every output is the same dot product as in the reference; the BLAS may still choose another
summation order for another number of rows.

Codes of 1, 2, 4 and 8 bits are fields of bytes. For the other widths 8 codes fill exactly `bits` bytes: they are
gathered into an int64 and moved apart by halves (4+4 codes into 32-bit lanes, 2+2 into 16-bit lanes, 1+1 into bytes),
so that the int64's bytes, in memory order, are the codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TILE = 1 << 20  # weights per tile on a CPU: 4 MB in fp32, about one L2; elsewhere 8 times that, for fewer launches


def decode(words: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Codes (R, length) uint8 of int32 words (R, K); equals `bits.unpack`."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets[:, :length]
    if 8 % bits == 0:
        codes = octets.new_empty(*octets.shape, 8 // bits)
        for i in range(8 // bits):
            codes[..., i] = (octets >> (bits * i)) & ((1 << bits) - 1)
        return codes.flatten(1)[:, :length]
    units = -(-length // 8)
    octets = F.pad(octets, (0, max(0, units * bits - octets.shape[1])))[:, : units * bits].unflatten(1, (units, bits))
    x = octets.new_zeros(len(octets), units, dtype=torch.int64)
    for i in range(bits):
        x |= octets[..., i].to(torch.int64).bitwise_left_shift_(8 * i)
    for lane in (32, 16, 8):  # two fields of bits*lane/8 bits, side by side, become two lanes
        width = bits * lane // 8
        low = sum(((1 << width) - 1) << start for start in range(0, 64, 2 * lane))
        high = (x & (low << width)).bitwise_left_shift_(lane - width)
        x &= low
        x |= high
    return x.view(torch.uint8)[:, :length]


def dequantize(words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Write (q - z) * scale into out (R, I) and return it; zero is (R, G) uint8, None where symmetric.

    The product is formed in fp32 and then rounded to out's dtype, which equals the reference bit for bit (and is faster than
    bf16 arithmetic on a CPU).
    """
    R, I = out.shape
    grouped = (R, scale.shape[1], I // scale.shape[1])
    codes = decode(words, bits, I).view(grouped)
    work = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    W = work.view(grouped)
    if zero is None:
        W.copy_((codes - (1 << (bits - 1))).view(torch.int8))  # wraps around in uint8, and is right read as int8
    elif bits < 8:
        W.copy_((codes - zero.unsqueeze(-1)).view(torch.int8))
    else:  # -255..255
        W.copy_(codes).sub_(zero.to(W.dtype).unsqueeze(-1))
    W *= scale.to(W.dtype).unsqueeze(-1)
    return out if work is out else out.copy_(work)


@torch.library.custom_op("compress_kernels::int_grouped_linear", mutates_args=())
def linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O), from words (O, K), scale (O, G), zero (O, G) uint8 or None."""
    O, I = words.shape[0], x.shape[-1]
    flat = x.reshape(-1, I)
    tile_size = TILE if x.device.type == "cpu" else 8 * TILE
    rows = max(1, min(O, tile_size // I))
    scratch = x.new_empty(rows, I)
    out = x.new_empty(len(flat), O)
    for start in range(0, O, rows):
        tile = slice(start, min(start + rows, O))
        W = dequantize(words[tile], scale[tile], None if zero is None else zero[tile], bits, scratch[: tile.stop - tile.start])
        out[:, tile] = F.linear(flat, W, None if bias is None else bias[tile])
    return out.view(*x.shape[:-1], O)


@linear.register_fake
def _(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])

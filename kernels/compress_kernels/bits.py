"""Dense bit packing: b-bit codes in int32 words, least significant bit first, each row padded to a whole word.

Values whose width does not divide 32 straddle word boundaries, as compressed-tensors >= 0.19 and GPTQ lay them out.
A period of 32 values fills exactly b words, so packing is 32 (or 32/b) vectorised shifts, whatever the length.
"""

from __future__ import annotations

import math

import torch


def _period(bits: int) -> tuple[int, int]:
    """Values and words per repeating unit of the layout."""
    g = math.gcd(32, bits)
    return 32 // g, bits // g


def words(length: int, bits: int) -> int:
    """Number of int32 words that hold `length` codes of `bits` bits."""
    return -(-length * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (R, L) of 0..2^bits-1 (any integer dtype) into int32 words (R, ceil(L*bits/32))."""
    rows, length = codes.shape
    values, per = _period(bits)
    units = -(-length // values)
    if 8 % bits == 0:
        return _pack_bytes(codes, bits, units * values)
    padded = torch.zeros(rows, units * values, dtype=torch.uint8, device=codes.device)
    padded[:, :length] = codes
    padded = padded.view(rows, units, values)
    out = torch.zeros(rows, units, per, dtype=torch.int64, device=codes.device)
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = padded[:, :, i].to(torch.int64)
        out[:, :, word] |= value << shift
        if shift + bits > 32:
            out[:, :, word + 1] |= value >> (32 - shift)
    out &= 0xFFFFFFFF
    out -= (out >> 31) << 32  # two's complement: the word's bits, read as a signed int32
    return out.to(torch.int32).view(rows, units * per)[:, : words(length, bits)].contiguous()


def _pack_bytes(codes: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """`pack` where whole codes fill a byte: a quarter of the time."""
    padded = torch.zeros(codes.shape[0], length, dtype=torch.uint8, device=codes.device)
    padded[:, : codes.shape[1]] = codes
    per = 8 // bits
    out = padded[:, 0::per].clone()
    for i in range(1, per):
        out |= padded[:, i::per] << (i * bits)
    return out.view(torch.int32)


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Unpack int32 words (R, K) into the first `length` codes of each row, uint8 (R, length)."""
    rows = packed.shape[0]
    values, per = _period(bits)
    units = -(-length // values)
    if packed.shape[1] != units * per:
        full = torch.zeros(rows, units * per, dtype=torch.int32, device=packed.device)
        full[:, : packed.shape[1]] = packed
        packed = full
    packed = packed.reshape(rows, units, per)
    mask = (1 << bits) - 1
    out = torch.empty(rows, units, values, dtype=torch.uint8, device=packed.device)
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = packed[:, :, word] >> shift
        if shift + bits > 32:  # the arithmetic shift's sign bits are masked off first
            value = (value & ((1 << (32 - shift)) - 1)) | (packed[:, :, word + 1] << (32 - shift))
        out[:, :, i] = (value & mask).to(torch.uint8)
    return out.view(rows, units * values)[:, :length]

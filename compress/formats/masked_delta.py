"""One base, a shared vector and one bit per weight and task: what a bundle holds of one tensor. Our own loader only.

Of a tensor (O, I) (leading dimensions of a larger one are flattened), theta_t = theta_0 + s_t d_t; d = b v, or (2 b - 1) v
where the param `signs` is true. Once for all tasks, by the param `shared`:

    bf16       shared         BF16 (O, I)
    int8       shared_packed  I32 (O, ceil(I·8/32))    codes, lowest bits first, each row starting at a word
               shared_scale   BF16 (O, 1)              v = (code - zero) scale; zero is 128, or 0 where `signs`
    int4       shared_packed  I32 (O, ceil(I·4/32)), shared_scale BF16 (O, I / group_size); zero is 8, or 0 where `signs`
    constant   shared         F32 (1,)

where a bundle's bits are levels, a second vector v_0 has the same tensors in a folder of its own, and d = b v + (1 - b) v_0;
and for each task:

    mask         I32 (O, ceil(I/32))   bits along the input, lowest first; a row's last bits are 0; or
    mask_deflate U8 (bytes,)           the same words, little-endian, as a zlib stream of Huffman codes, where that saves over 2 %
    scale        F16 (1,)              s
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from compress_kernels import bits as bitpack
from compress_kernels import masked_delta as kernel

from compress.errors import CompressError
from compress.types import Packed, TensorSpec

KIND = "masked_delta"
VERSION = 1
BIT_ORDER = "lowest bit first, 32 bits to a word, along the last dimension"
_WORTH = 0.98  # coded planes above this share of the raw ones are stored raw
_BITS = {"int8": 8, "int4": 4}


def words(inputs: int) -> int:
    """int32 words that hold a row of bits."""
    return bitpack.words(inputs, 1)


def shared_spec(params: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of the shared vector of a tensor (O, I)."""
    O, I = shape
    kind = params["shared"]
    if kind == "constant":
        return {"shared": ("F32", (1,))}
    if kind == "bf16":
        return {"shared": ("BF16", (O, I))}
    if kind not in _BITS:
        raise CompressError(f"shared vector of kind {kind!r} is unknown", hint="the bundle is newer: upgrade llm-compress")
    size = int(params["group_size"])
    G = 1 if size == -1 else I // size
    return {"shared_packed": ("I32", (O, bitpack.words(I, _BITS[kind]))), "shared_scale": ("BF16", (O, G))}


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of the shared vector and one task's raw bits."""
    return {**shared_spec(params, shape), "mask": ("I32", (shape[0], words(shape[1]))), "scale": ("F16", (1,))}


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Words (O, ceil(I/32)) int32 of bits (O, I) bool."""
    packed = bitpack.pack(mask, 1)
    return packed[:, : words(mask.shape[1])].contiguous()


def unpack_mask(packed: torch.Tensor, inputs: int) -> torch.Tensor:
    """Bits (O, I) bool: exactly what was packed."""
    return kernel.unpack_mask(packed, inputs)


def deflate(plane: torch.Tensor) -> torch.Tensor | None:
    """The words of a plane as a zlib stream of Huffman codes, uint8 (bytes,); None where that saves less than 2 %.

    Bits of a mask are nearly independent: matches do not help (full deflate is worse), byte frequencies do below a density of 0.4.
    """
    raw = plane.contiguous().view(-1).view(torch.uint8).numpy().data
    coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(raw) + coder.flush()
    if len(coded) > _WORTH * plane.numel() * 4:
        return None
    return torch.frombuffer(bytearray(coded), dtype=torch.uint8)


def inflate(coded: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The words (O, ceil(I/32)) int32 of a coded plane of a tensor (O, I); anything else than exactly those is an error."""
    size = (shape[0], words(shape[1]))
    wanted = size[0] * size[1] * 4
    coder = zlib.decompressobj()
    try:
        raw = coder.decompress(coded.contiguous().numpy().data, wanted + 1)
    except zlib.error as error:
        raise CompressError(f"a coded mask is damaged ({error})", hint="copy the bundle again") from error
    if len(raw) != wanted or not coder.eof:
        raise CompressError(f"a coded mask holds {len(raw)} bytes, wanted {wanted}", hint="copy the bundle again")
    return torch.frombuffer(bytearray(raw), dtype=torch.int32).view(size)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words (R, ceil(C·bits/32)) int32 of codes (R, C) uint8."""
    return bitpack.pack(codes, bits)[:, : bitpack.words(codes.shape[1], bits)].contiguous()


def width(kind: str) -> int:
    """Bits of a code of the shared vector; 16 and 32 where there are none."""
    return _BITS.get(kind, 32 if kind == "constant" else 16)


def opened(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any]) -> kernel.Shared:
    """The shared vector for the kernel, from its tensors by suffix."""
    if "shared" in tensors:
        return kernel.Shared(tensors["shared"])
    bits = _BITS[params["shared"]]
    return kernel.Shared(tensors["shared_packed"], tensors["shared_scale"], bits, 0 if params["signs"] else 1 << (bits - 1))


def pack(shared: Mapping[str, torch.Tensor], params: Mapping[str, Any], mask: torch.Tensor, scale: float) -> Packed:
    """One task of one tensor: the shared vector's tensors, bits (O, I) bool, s."""
    factor = torch.tensor([scale], dtype=torch.float64).to(torch.float16)
    shape = (int(mask.shape[0]), int(mask.shape[1]))
    return Packed(KIND, VERSION, dict(params), {**shared, "mask": pack_mask(mask), "scale": factor}, shape)


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, float]:
    """v (O, I) or (1,) fp32, bits (O, I) bool, s."""
    v = kernel.decode_shared(opened(packed.tensors, packed.params), packed.shape[1])
    return v, unpack_mask(packed.tensors["mask"], packed.shape[1]), float(packed.tensors["scale"])


def dequantize(packed: Packed) -> torch.Tensor:
    """s d (O, I) in fp32: what is added to the base."""
    scale = float(packed.tensors["scale"])
    delta = kernel.Delta(packed.tensors["mask"], scale)
    pair = kernel.values(opened(packed.tensors, packed.params), packed.shape[1], bool(packed.params["signs"]))
    return kernel.decode(delta, pair, packed.shape[1]).expand(packed.shape)

"""N of every M consecutive inputs, quantized: grouped integers of the kept weights only. Our own loader only.

Layout for W (O, I), params n and m, K = I*n/m kept columns, `bits` b, G = I / group_size:

    meta               uint8              as `sparse24`
    weight_packed      int32 (O, ceil(K*b/32))     codes of the kept weights in the order of their columns, as `int_grouped`
    weight_scale       float (O, G)                as `int_grouped`: a group has group_size columns of W, a multiple of m,
    weight_zero_point  int32 (ceil(O*b/32), G)     and so group_size*n/m kept ones; zeros where asymmetric only
    weight_shape       int64 (2,)                  O, I

    W = (q - z) * scale in the kept places, exactly 0 elsewhere.

A kept weight may have the zero-point's code: a group of m with fewer than n other codes is filled as `sparse24.complete_mask` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compress_kernels import _sparse
from compress_kernels.sparse24_int import reference

from compress.formats import int_grouped, sparse24
from compress.types import Packed, TensorSpec

KIND = "sparse24_int"
VERSION = 1

bits_per_weight = int_grouped.bits_per_weight


def _compact(params: Mapping[str, Any], shape: tuple[int, int]) -> tuple[dict[str, Any], tuple[int, int]]:
    """`int_grouped`'s params and shape (O, K) of the kept columns of a weight of `shape` (O, I)."""
    sparse24.check(reference.unfit(params, shape[1]))
    n, m, size = (int(params[key]) for key in ("n", "m", "group_size"))
    size = -1 if size == -1 else size // m * n
    return {"bits": params["bits"], "group_size": size, "symmetric": params["symmetric"]}, (shape[0], shape[1] // m * n)


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I) whose scales have safetensors dtype `dtype`."""
    pattern = sparse24.spec(params, shape, dtype)
    return int_grouped.spec(*_compact(params, shape), dtype) | {"meta": pattern["meta"]}


def pack(
    q: torch.Tensor,
    mask: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    n: int,
    m: int,
) -> Packed:
    """Pack codes q (O, I*n/m) uint8 of the kept weights, their mask (O, I) bool, scale (O, G) and zero (O, G) uint8 or None.

    A group of m that has not exactly n kept weights raises.
    """
    shape = (int(mask.shape[0]), int(mask.shape[1]))
    params = {"bits": bits, "group_size": group_size, "symmetric": zero is None, "n": n, "m": m}
    _compact(params, shape)
    base = int_grouped.pack(q, scale, zero, bits=bits, group_size=group_size)
    meta = _sparse.pack_codes(sparse24.positions(mask, n, m), _sparse.position_bits(m))
    own = {"meta": meta, "weight_shape": torch.tensor(shape, dtype=torch.int64)}
    return Packed(KIND, VERSION, params, {**base.tensors, **own}, shape)


def _positions(packed: Packed) -> tuple[torch.Tensor, int, int]:
    """Positions (O, I*n/m) uint8 of the kept weights, n and m."""
    n, m = int(packed.params["n"]), int(packed.params["m"])
    return _sparse.unpack_positions(packed.tensors["meta"], n, m, packed.shape[1]), n, m


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes (O, I*n/m) uint8, mask (O, I) bool, scale (O, G), zero (O, G) uint8 or None: exactly what was packed."""
    params, shape = _compact(packed.params, packed.shape)
    kept = Packed(int_grouped.KIND, int_grouped.VERSION, params, packed.tensors, shape)
    q, scale, zero = int_grouped.unpack(kept)
    return q, sparse24.mask_of(*_positions(packed)), scale, zero


def _zeros(zero: torch.Tensor | None, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """The zero-point of every weight (O, I), uint8, from zero (O, G) uint8 or None."""
    if zero is None:
        return torch.full(shape, 1 << (bits - 1), dtype=torch.uint8)
    return zero.repeat_interleave(shape[1] // zero.shape[1], 1)


def from_int_grouped(packed: Packed, params: Mapping[str, Any]) -> Packed:
    """The same weight, code for code, from `int_grouped`; `params` has n and m.

    A group of m with more than n codes that are not the zero-point's raises.
    """
    n, m, bits, size = int(params["n"]), int(params["m"]), int(packed.params["bits"]), int(packed.params["group_size"])
    q, scale, zero = int_grouped.unpack(packed)
    mask = sparse24.complete_mask(q ^ _zeros(zero, bits, packed.shape), n, m)
    kept = _sparse.gather(q, _sparse.positions(mask, n, m), n, m)
    return pack(kept, mask, scale, zero, bits=bits, group_size=size, n=n, m=m)


def to_int_grouped(packed: Packed) -> Packed:
    """The reverse of `from_int_grouped`: pruned weights have the zero-point's code."""
    kept, _, scale, zero = unpack(packed)
    bits, size = int(packed.params["bits"]), int(packed.params["group_size"])
    q = _sparse.place(kept, *_positions(packed), _zeros(zero, bits, packed.shape).contiguous())
    return int_grouped.pack(q, scale, zero, bits=bits, group_size=size)


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I) in fp32: (q - z) * scale in the kept places, exact zeros elsewhere."""
    return reference.dequantize(packed.tensors, packed.params, packed.shape)


def problems(packed: Packed) -> list[str]:
    """What is wrong with the tensors; empty where they can be used. `unpack` and `dequantize` do not look."""
    return reference.problems(packed.tensors, packed.params, packed.shape)

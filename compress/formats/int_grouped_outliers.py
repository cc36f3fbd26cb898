"""Grouped integers with exact 16-bit outliers (GWQ, after SpQR): `int_grouped` and a CSR side-car. Our own loader only.

Layout for W (O, I), `bits` b, G groups, `outliers` nnz; E is F16 or BF16, the checkpoint's dtype (F16 for F32):

    weight_packed, weight_shape, weight_zero_point    as `int_grouped`
    weight_scale         E (O, G)                     without a second level
    weight_scale_packed  int32 (ceil(O*3/32), G)      with one: 3-bit codes, packed along the output rows,
    weight_scale_offset  E (ceil(O/16), G)            scale[o, k] = offset[o // 16, k] + code[o, k] * step[o // 16, k] in fp32
    weight_scale_step    E (ceil(O/16), G)
    outlier_indptr       int32 (O + 1)                row o's outliers are indptr[o] .. indptr[o + 1] - 1
    outlier_index        uint16 (nnz), int32 where I > 65536    columns, ascending in each row
    outlier_value        E (nnz)

    W = (q - z) * scale, and outlier_value in the outliers' places, where q = z: the dense part is exactly 0 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compress_kernels import bits as bitpack
from compress_kernels.int_grouped_outliers import reference

from compress.formats import int_grouped
from compress.types import Packed, TensorSpec

KIND = "int_grouped_outliers"
VERSION = 1

Second = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What was packed."""

    q: torch.Tensor  # (O, I) uint8
    scale: torch.Tensor  # (O, G): as stored, or fp32 from the second level
    zero: torch.Tensor | None  # (O, G) uint8; None where symmetric
    index: torch.Tensor  # (nnz,) int64, flat positions, ascending
    value: torch.Tensor  # (nnz,)
    second: Second | None  # codes (O, G) uint8, offset and step (ceil(O/16), G)


def value_dtype(dtype: str) -> str:
    """E: the 16-bit safetensors dtype of scales and outliers of a checkpoint of safetensors dtype `dtype`."""
    return dtype if dtype in ("F16", "BF16") else "F16"


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I) of a checkpoint of safetensors dtype `dtype`."""
    O, I = shape
    G, nnz, E = int_grouped.groups(params, shape), int(params["outliers"]), value_dtype(dtype)
    out = int_grouped.spec(params, shape, E)
    if params["second_level"]:
        del out["weight_scale"]
        statistics = (E, (-(-O // reference.ROWS), G))
        out["weight_scale_packed"] = ("I32", (bitpack.words(O, reference.SCALE_BITS), G))
        out |= {"weight_scale_offset": statistics, "weight_scale_step": statistics}
    index = "U16" if _short(I) else "I32"
    return out | {"outlier_indptr": ("I32", (O + 1,)), "outlier_index": (index, (nnz,)), "outlier_value": (E, (nnz,))}


def _short(inputs: int) -> bool:
    """Whether a column fits uint16."""
    return inputs <= 1 << 16


def complete(params: Mapping[str, Any], found: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """`params` with what config.json does not hold, from the specs of the tensors found under the linear's name."""
    _, shape = found.get("outlier_value", ("F16", (0,)))
    return {**params, "outliers": shape[0] if shape else 0, "second_level": "weight_scale_packed" in found}


def pack(
    q: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    index: torch.Tensor,
    value: torch.Tensor,
    second: Second | None = None,
) -> Packed:
    """Pack codes q (O, I) uint8, zero (O, G) uint8 (None: symmetric) and outliers: flat ascending index and value (nnz,).

    Scales are scale (O, G), 16-bit, or second: codes (O, G) uint8, offset and step (ceil(O/16), G), 16-bit. A negative
    zero among the values is stored as zero.
    """
    O, I = int(q.shape[0]), int(q.shape[1])
    scales = _pack_scales(scale, second, O, value.dtype)
    outliers = _pack_outliers(index, value, (O, I))
    middle: torch.Tensor | int = 1 << (bits - 1)
    if zero is not None:
        middle = zero[index // I, index % I // (I // zero.shape[1])]
    assert bool((q.reshape(-1)[index] == middle).all()), "the dense code at an outlier is the zero-point"
    base = int_grouped.pack(q, next(iter(scales.values())), zero, bits=bits, group_size=group_size)
    tensors = {name: t for name, t in base.tensors.items() if name != "weight_scale"} | scales | outliers
    params = {**base.params, "outliers": len(index), "second_level": second is not None}
    return Packed(KIND, VERSION, params, tensors, (O, I))


def _pack_scales(scale: torch.Tensor | None, second: Second | None, rows: int, E: torch.dtype) -> dict[str, torch.Tensor]:
    """Scales of `rows` output rows as stored, of one level or two."""
    assert (scale is None) == (second is not None), "scales have one level or two"
    if second is None:
        assert scale is not None
        assert scale.dtype == E, "scales have the dtype of the outliers"
        return {"weight_scale": scale.contiguous()}
    codes, offset, step = second
    assert offset.dtype == step.dtype == E, "offset and step have the dtype of the outliers"
    assert offset.shape == step.shape == (-(-rows // reference.ROWS), codes.shape[1]), "one offset and step per 16 rows"
    assert int(codes.amax()) < 1 << reference.SCALE_BITS
    packed = bitpack.pack(codes.T, reference.SCALE_BITS).T.contiguous()
    return {"weight_scale_packed": packed, "weight_scale_offset": offset.contiguous(), "weight_scale_step": step.contiguous()}


def _pack_outliers(index: torch.Tensor, value: torch.Tensor, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The side-car of a weight of `shape` (O, I)."""
    O, I = shape
    assert value.dtype in (torch.float16, torch.bfloat16), "outliers are 16-bit"
    assert index.shape == value.shape
    assert len(index) < 1 << 31
    indptr = torch.zeros(O + 1, dtype=torch.int32)
    if len(index):
        assert bool((index.diff() > 0).all()), "positions ascend"
        assert index[0] >= 0
        assert index[-1] < O * I
        indptr[1:] = torch.bincount(index // I, minlength=O).cumsum(0)
    columns = (index % I).to(torch.uint16 if _short(I) else torch.int32)
    return {"outlier_indptr": indptr, "outlier_index": columns, "outlier_value": value + 0.0}  # -0.0 + 0.0 is 0.0


def _dense_part(packed: Packed) -> Packed:
    """The `int_grouped` weight under the outliers; its scales are fp32 where there is a second level."""
    scale = reference.stored_scales(packed.tensors, packed.shape[0])
    return Packed(int_grouped.KIND, int_grouped.VERSION, packed.params, {**packed.tensors, "weight_scale": scale}, packed.shape)


def _outliers(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row pointers (O + 1,), columns (nnz,) and values (nnz,)."""
    return packed.tensors["outlier_indptr"], packed.tensors["outlier_index"], packed.tensors["outlier_value"]


def unpack(packed: Packed) -> Unpacked:
    """Exactly what was packed."""
    tensors, (O, I) = packed.tensors, packed.shape
    q, scale, zero = int_grouped.unpack(_dense_part(packed))
    second = None
    if packed.params["second_level"]:
        codes = bitpack.unpack(tensors["weight_scale_packed"].T.contiguous(), reference.SCALE_BITS, O).T.contiguous()
        second = codes, tensors["weight_scale_offset"], tensors["weight_scale_step"]
    indptr, index, value = _outliers(packed)
    return Unpacked(q, scale, zero, reference.positions(indptr, index, I), value, second)


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I) in fp32: (q - z) * scale, and the outliers' values in their places."""
    W = int_grouped.dequantize(_dense_part(packed))
    indptr, index, value = _outliers(packed)
    W.view(-1)[reference.positions(indptr, index, packed.shape[1])] = value.float()
    return W


def problems(packed: Packed) -> list[str]:
    """What is wrong with the outliers; empty where they can be used. `unpack` and `dequantize` do not look."""
    found = reference.problems(*_outliers(packed), packed.shape)
    if found:
        return found
    there = int_grouped.dequantize(_dense_part(packed)).view(-1)[unpack(packed).index]
    count = int(there.count_nonzero())
    return [f"the dense part is not 0 under {count} outliers"] if count else []


bits_per_weight = int_grouped.bits_per_weight

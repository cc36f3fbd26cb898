"""Thin factors and some whole columns (LOST's shape, after training): W = B A + W_s P_I. Our own loader only.

Layout for W (O, I), rank r, s kept columns; E is F16 or BF16, the checkpoint's dtype (F16 for F32):

    B        E (O, r)
    A        E (r, I - s)     over the other columns in their order; (r, I) where the param `compact` is false
    columns  uint16 (s,)      the kept columns, ascending; int32 where I > 65536
    W_s      E (O, s)

B and A are absent where r = 0, columns and W_s where s = 0; s = I is the whole weight. With params `value_bits` b and `value_group`
g the factors are symmetric `int_grouped` rows, padded with zeros to whole groups, in place of B, A and W_s:

    A_packed int32 (r, ceil(pad(I - s) b / 32)), A_scale E (r, pad(I - s) / g)
    U_packed int32 (O, ceil(pad(r + s) b / 32)), U_scale E (O, pad(r + s) / g)        of U = [B | W_s]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compress_kernels.lowrank_sparse import reference

from compress.errors import CompressError
from compress.formats import int_grouped, int_grouped_outliers
from compress.types import Packed, TensorSpec, Trainable

KIND = "lowrank_sparse"
VERSION = 1
TOLD = frozenset({"rank", "columns"})  # params that the tensors' shapes tell; they differ from linear to linear

value_dtype = int_grouped_outliers.value_dtype
bits_per_weight = int_grouped.bits_per_weight


def parameters(params: Mapping[str, Any], shape: tuple[int, int]) -> int:
    """Values that stand for a weight of `shape` (O, I); the columns' indices are not counted."""
    rank, kept, inputs = reference.sizes(params, shape)
    return rank * (shape[0] + inputs) + kept * shape[0]


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I) of a checkpoint of safetensors dtype `dtype`."""
    why = reference.unfit(params, shape)
    if why is not None:
        raise CompressError(why, hint="the artifact is damaged: copy it again")
    E, index = value_dtype(dtype), "U16" if shape[1] <= reference.SHORT else "I32"

    def of(name: str) -> str:
        return index if name == "columns" else "I32" if name.endswith("_packed") else E

    return {name: (of(name), size) for name, size in reference.tensor_shapes(params, shape).items()}


def complete(params: Mapping[str, Any], found: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """`params` with what config.json does not hold, from the specs of the tensors found under the linear's name."""
    rows = [found[name][1][0] for name in ("A", "A_packed") if name in found and found[name][1]]
    kept = found.get("columns", ("U16", (0,)))[1]
    return {**params, "rank": rows[0] if rows else 0, "columns": kept[0] if kept else 0}


def pack(B: torch.Tensor, A: torch.Tensor, columns: torch.Tensor, W_s: torch.Tensor, inputs: int) -> Packed:
    """Pack B (O, r), A (r, I - s) or (r, I), ascending columns (s,) and W_s (O, s), 16-bit, of a weight with `inputs` columns."""
    assert {t.dtype for t in (B, A, W_s)} in ({torch.float16}, {torch.bfloat16}), "one 16-bit dtype"
    shape = (int(B.shape[0]), inputs)
    params: dict[str, Any] = {"rank": int(B.shape[1]), "columns": len(columns)}
    if A.shape[1] == inputs and len(columns):
        params["compact"] = False
    short = inputs <= reference.SHORT
    tensors = {"columns": columns.to(torch.int32).to(torch.uint16 if short else torch.int32), "B": B, "A": A, "W_s": W_s}
    return _packed(params, shape, tensors)


def pack_codes(
    A: tuple[torch.Tensor, torch.Tensor] | None, U: tuple[torch.Tensor, torch.Tensor], columns: torch.Tensor, inputs: int, *,
    bits: int, group: int, rank: int, compact: bool = True,
) -> Packed:  # fmt: skip
    """Pack quantized factors: codes uint8 (R, K) and scales (R, G) of A, and of U = [B | W_s], each row padded to whole groups.

    The codes of the padding are the zero-point's.
    """
    params: dict[str, Any] = {"rank": rank, "columns": len(columns), "value_bits": bits, "value_group": group}
    if not compact and len(columns):
        params["compact"] = False
    short = inputs <= reference.SHORT
    tensors = {"columns": columns.to(torch.int32).to(torch.uint16 if short else torch.int32)}
    for name, part in (("A", A), ("U", U)):
        if part is not None:
            found = int_grouped.pack(*part, None, bits=bits, group_size=group).tensors
            tensors |= {f"{name}_packed": found["weight_packed"], f"{name}_scale": found["weight_scale"]}
    return _packed(params, (int(U[0].shape[0]), inputs), tensors)


def _packed(params: dict[str, Any], shape: tuple[int, int], tensors: dict[str, torch.Tensor]) -> Packed:
    """Only the tensors that such a weight has, each of its shape; a negative zero is stored as zero."""
    wanted = reference.tensor_shapes(params, shape)
    kept = {name: (t + 0.0 if t.is_floating_point() else t).contiguous() for name, t in tensors.items() if name in wanted}
    why = reference.problems(kept, params, shape)
    assert not why, why
    return Packed(KIND, VERSION, params, kept, shape)


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """B (O, r), A (r, I - s) or (r, I), columns (s,) int64 and W_s (O, s): what was packed; fp32 where it was quantized."""
    A, U = reference.factors(packed.tensors, packed.params, packed.shape)
    columns, _ = reference.split(packed.tensors.get("columns"), packed.shape[1], U.device)
    return U[:, : len(A)], A, columns, U[:, len(A) :]


def unpack_codes(packed: Packed, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, K) uint8, padding and all, and scale (R, G) of the quantized factor `name`, A or U."""
    scale = packed.tensors[f"{name}_scale"]
    size = int(packed.params["value_group"])
    tensors = {"weight_packed": packed.tensors[f"{name}_packed"], "weight_scale": scale}
    params = {"bits": packed.params["value_bits"], "group_size": size, "symmetric": True}
    one = Packed(int_grouped.KIND, int_grouped.VERSION, params, tensors, (int(scale.shape[0]), int(scale.shape[1]) * size))
    q, scale, _ = int_grouped.unpack(one)
    return q, scale


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I), B A + W_s P_I multiplied in fp32."""
    return reference.dequantize(packed.tensors, packed.params, packed.shape)


def trainable(packed: Packed) -> Trainable:
    """Factors and kept columns may change, which columns may not. Quantized ones keep their scales, and are trained as rounded."""
    B, A, columns, W_s = unpack(packed)
    inputs, rank = packed.shape[1], B.shape[1]
    parts = {"A": A.float(), "B": B.float(), "W_s": W_s.float()}
    parts = {name: t for name, t in parts.items() if t.numel()}

    def whole(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        device = next(iter(parts.values())).device
        U = torch.cat([parts.get("B", B.float().to(device)), parts.get("W_s", W_s.float().to(device))], 1)
        return parts.get("A", A.float().to(device)), U

    if "value_bits" in packed.params:
        return _trainable_codes(packed, parts, whole, columns)

    def weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        A, U = whole(parts)
        return reference.join(A, U, columns.to(A.device), inputs)

    def rebuild(parts: Mapping[str, torch.Tensor]) -> Packed:
        left, U = (t.cpu().to(B.dtype) for t in whole(parts))
        return pack(U[:, :rank], left, columns.cpu(), U[:, rank:], inputs)

    return Trainable(parts, weight, rebuild)


def _trainable_codes(packed: Packed, parts: dict[str, torch.Tensor], whole: Any, columns: torch.Tensor) -> Trainable:
    """Straight through the rounding: the gradient is that of the rounded values, the step is taken on those behind them."""
    params, inputs = packed.params, packed.shape[1]
    bits, group, rank = int(params["value_bits"]), int(params["value_group"]), int(params["rank"])
    scales = {name: packed.tensors[f"{name}_scale"] for name in ("A", "U") if f"{name}_scale" in packed.tensors}
    middle = 1 << (bits - 1)

    def codes(X: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes about 0 (R, G, g) of X (R, L), padded."""
        full = torch.nn.functional.pad(X, (0, scale.shape[1] * group - X.shape[1])).unflatten(1, (-1, group))
        return (full / scale.unsqueeze(-1)).round().clamp(-middle, middle - 1)

    def rounded(X: torch.Tensor, name: str) -> torch.Tensor:
        if name not in scales:
            return X
        scale = scales[name].to(X.device).float()
        with torch.no_grad():
            off = (codes(X, scale) * scale.unsqueeze(-1)).flatten(1)[:, : X.shape[1]] - X
        return X + off

    def weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        A, U = whole(parts)
        return reference.join(rounded(A, "A"), rounded(U, "U"), columns.to(A.device), inputs)

    def rebuild(parts: Mapping[str, torch.Tensor]) -> Packed:
        found = {n: X.cpu() for n, X in zip(("A", "U"), whole(parts), strict=True)}
        made = {n: ((codes(found[n], s.float()) + middle).flatten(1).to(torch.uint8), s) for n, s in scales.items()}
        compact = bool(params.get("compact", True))
        return pack_codes(made.get("A"), made["U"], columns.cpu(), inputs, bits=bits, group=group, rank=rank, compact=compact)

    return Trainable(parts, weight, rebuild)


def problems(packed: Packed) -> list[str]:
    """What is wrong with the tensors; empty where they can be used. `unpack` and `dequantize` do not look."""
    return reference.problems(packed.tensors, packed.params, packed.shape)

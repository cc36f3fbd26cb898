"""The definition of `lowrank_sparse`: y = [B | W_s] [A x_J ; x_I] + bias, two products with x's columns gathered between them.

I are the kept columns, J the others in their order; x_I are x's entries in I. Both products are taken in x's dtype, to which the
factors and A x_J are rounded. Where the param `compact` is false A covers all columns, I too. A path may differ in the order of
summation only.

With the param `value_bits` A and U = [B | W_s] are symmetric `int_grouped` matrices whose rows are padded to whole groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from compress_kernels import _sparse
from compress_kernels import bits as bitpack
from compress_kernels.int_grouped import reference as int_grouped

SHORT = 1 << 16  # inputs whose columns fit uint16


def sizes(params: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int, int]:
    """Rank, kept columns, and inputs of A, for a weight of `shape` (O, I)."""
    rank, kept = int(params["rank"]), int(params["columns"])
    return rank, kept, shape[1] - kept if params.get("compact", True) else shape[1]


def unfit(params: Mapping[str, Any], shape: tuple[int, int]) -> str | None:
    """None, or why a weight of `shape` (O, I) cannot have these params."""
    rank, kept, _ = sizes(params, shape)
    if not 0 <= kept <= shape[1]:
        return f"{kept} columns cannot be kept of {shape[1]}"
    if not 0 <= rank <= min(shape):
        return f"rank {rank} is not one of 0..{min(shape)}"
    if not rank and not kept:
        return "neither a rank nor columns: nothing is left"
    if params.get("value_bits", 4) not in (2, 3, 4, 8):
        return f"{params['value_bits']} bits per value: 2, 3, 4 or 8"
    return None


def padded(length: int, group: int) -> int:
    """`length` in whole groups."""
    return -(-length // group) * group


def tensor_shapes(params: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a weight of `shape` (O, I)."""
    (O, _), (rank, kept, inputs) = shape, sizes(params, shape)
    out: dict[str, tuple[int, ...]] = {"columns": (kept,)} if kept else {}
    if "value_bits" not in params:
        out |= {"B": (O, rank), "A": (rank, inputs)} if rank else {}
        return out | ({"W_s": (O, kept)} if kept else {})
    b, g = int(params["value_bits"]), int(params["value_group"])
    for name, rows, length in (("A", rank, inputs), ("U", O, rank + kept)):
        if rows and length and (rank or name == "U"):
            whole = padded(length, g)
            out |= {f"{name}_packed": (rows, bitpack.words(whole, b)), f"{name}_scale": (rows, whole // g)}
    return out


def problems(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> list[str]:
    """What is wrong with the tensors of a weight of `shape` (O, I); empty where they can be used."""
    why = unfit(params, shape)
    if why:
        return [why]
    wanted = tensor_shapes(params, shape)
    found = [p for name, size in wanted.items() for p in _sparse.misshapen(name, tensors[name], size)]
    if found:
        return found
    if "columns" in wanted:
        at = tensors["columns"].to(torch.int64)
        if int(at[0]) < 0 or int(at[-1]) >= shape[1] or bool((at.diff() <= 0).any()):
            found.append(f"columns are not ascending ones of 0..{shape[1] - 1}")
    floats = [name for name in wanted if tensors[name].is_floating_point()]
    return found + [p for name in floats for p in _sparse.not_finite(name, tensors[name])]


def split(columns: torch.Tensor | None, inputs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept columns I and the others J, ascending, int64."""
    left = torch.ones(inputs, dtype=torch.bool, device=device)
    kept = torch.empty(0, dtype=torch.int64, device=device) if columns is None else columns.to(torch.int64)
    left[kept] = False
    return kept, left.nonzero().squeeze(1)


def factors(
    tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, I - s), or (r, I) without `compact`, and U = [B | W_s] (O, r + s), as stored, or fp32 where they are quantized."""
    rank, kept, inputs = sizes(params, shape)
    if "value_bits" in params:
        b, g = int(params["value_bits"]), int(params["value_group"])
        found = []
        for name, rows, length in (("A", rank, inputs), ("U", shape[0], rank + kept)):
            if f"{name}_packed" not in tensors:
                found.append(tensors["U_scale"].new_empty(rows, length, dtype=torch.float32))
                continue
            size = rows, padded(length, g)
            whole = int_grouped.dequantize(tensors[f"{name}_packed"], tensors[f"{name}_scale"], None, b, size)
            found.append(whole[:, :length])
        return found[0], found[1]
    parts = [tensors[name] for name in ("B", "W_s") if name in tensors]
    U = torch.cat(parts, 1)
    return tensors["A"] if rank else U.new_empty(0, inputs), U


def dequantize(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    """The weight B A + W_s P_I (O, I), multiplied in fp32."""
    A, U = factors(tensors, params, shape)
    return join(A.float(), U.float(), tensors.get("columns"), shape[1])


def join(A: torch.Tensor, U: torch.Tensor, columns: torch.Tensor | None, inputs: int) -> torch.Tensor:
    """The weight (O, I) of A and U = [B | W_s] in their dtype; differentiable."""
    I, J = split(columns, inputs, U.device)
    rank = len(A)
    low = U[:, :rank] @ A
    if A.shape[1] == inputs:
        return low.index_add(1, I, U[:, rank:])
    return torch.cat([low, U[:, rank:]], 1)[:, torch.cat([J, I]).argsort()]


def linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    A, U = factors(tensors, params, shape)
    I, J = split(tensors.get("columns"), shape[1], x.device)
    inside = x if A.shape[1] == shape[1] else x[..., J]
    return F.linear(torch.cat([F.linear(inside, A.to(x.dtype)), x[..., I]], -1), U.to(x.dtype), bias)

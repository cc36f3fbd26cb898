"""The definition of `lost`: y = gamma * B f(A x) + (1 - gamma) * W_s x_I + bias, where x_I are the inputs in `columns`.

f is SiLU, or nothing where the param `activation` is "identity". Every step is taken in x's dtype: the factors are rounded to it,
gamma scales the rank-r vector and 1 - gamma the gathered inputs, and the sparse path with the bias is added last. SiLU stands
between the factors, so there is no weight that does the same. Everything is differentiable: layers train by it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from compress_kernels import _sparse

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "identity": lambda x: x}


def unfit(params: Mapping[str, Any], shape: tuple[int, int]) -> str | None:
    """None, or why a linear of `shape` (O, I) cannot have these params."""
    rank, kept, gamma = int(params["rank"]), int(params["kept"]), float(params["gamma"])
    if params["activation"] not in ACTIVATIONS:
        return f"the activation is {params['activation']!r}, not {' or '.join(ACTIVATIONS)}"
    if not 1 <= rank <= min(shape):
        return f"rank {rank} of a linear of {shape[0]} x {shape[1]}: 1 to {min(shape)} are possible"
    if not 0 <= kept <= shape[1]:
        return f"{kept} kept columns of {shape[1]} inputs"
    return None if 0 <= gamma <= 1 else f"gamma {gamma} is not between 0 and 1"


def shapes(params: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a linear (O, I)."""
    (O, I), rank, kept = shape, int(params["rank"]), int(params["kept"])
    return {"B": (O, rank), "A": (rank, I), "columns": (kept,), "W_s": (O, kept)}


def problems(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> list[str]:
    """What is wrong with the tensors of a linear of `shape` (O, I); empty where they can be used."""
    why = unfit(params, shape)
    if why:
        return [why]
    found = []
    for name, size in shapes(params, shape).items():
        found += _sparse.misshapen(name, tensors[name], size) or _sparse.not_finite(name, tensors[name])
    if found:
        return found
    columns = tensors["columns"].to(torch.int64)
    if len(columns) and (int(columns[0]) < 0 or int(columns[-1]) >= shape[1] or bool((columns.diff() <= 0).any())):
        return [f"columns are not ascending ones below {shape[1]}"]
    return []


def linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    A, B, W_s = (tensors[name].to(x.dtype) for name in ("A", "B", "W_s"))
    gamma, columns = float(params["gamma"]), tensors["columns"].to(torch.int64)
    y = F.linear(gamma * ACTIVATIONS[params["activation"]](F.linear(x, A)), B)
    if len(columns):
        return y + F.linear((1 - gamma) * x.index_select(-1, columns), W_s, bias)
    return y if bias is None else y + bias


def weight(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any]) -> torch.Tensor:
    """The weight gamma B A + (1 - gamma) W_s P_I (O, I), fp32; only without an activation is there one."""
    assert params["activation"] == "identity", "SiLU between the factors: no weight does the same"
    gamma = float(params["gamma"])
    W = gamma * (tensors["B"].float() @ tensors["A"].float())
    return W.index_add_(1, tensors["columns"].to(torch.int64), (1 - gamma) * tensors["W_s"].float())

"""The definition of `sparse24_int`: the kept columns' `int_grouped` weight in its places, zeros elsewhere, then `F.linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from compress_kernels import _sparse
from compress_kernels import bits as bitpack
from compress_kernels.int_grouped import reference as int_grouped


def unfit(params: Mapping[str, Any], inputs: int) -> str | None:
    """None, or why a weight with `inputs` columns cannot have these params."""
    bits, n, m, size = (int(params[key]) for key in ("bits", "n", "m", "group_size"))
    why = _sparse.unfit(n, m, inputs)
    if why is None and not 1 <= bits <= 8:
        return f"{bits} bits are not 1 to 8"
    if why is None and size != -1 and (size < 1 or size % m):
        return f"group_size {size} is no multiple of {m}, the columns that {n}:{m} looks at together"
    if why is None and size != -1 and inputs % size:
        return f"{inputs} inputs cannot be split into groups of {size}"
    return why


def problems(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> list[str]:
    """What is wrong with the tensors of a weight of `shape` (O, I); empty where they can be used."""
    O, I = shape
    why = unfit(params, I)
    if why:
        return [why]
    n, m, bits, size = (int(params[key]) for key in ("n", "m", "bits", "group_size"))
    G, scale, zero = 1 if size == -1 else I // size, tensors["weight_scale"], tensors.get("weight_zero_point")
    found = _sparse.position_problems(tensors["meta"], n, m, shape)
    found += _sparse.misshapen("weight_packed", tensors["weight_packed"], (O, bitpack.words(I // m * n, bits)))
    found += _sparse.misshapen("weight_scale", scale, (O, G)) or _sparse.not_finite("weight_scale", scale)
    if zero is not None:
        found += _sparse.misshapen("weight_zero_point", zero, (bitpack.words(O, bits), G))
    return found


def dequantize(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight (O, I) in fp32: (q - z) * scale in the kept places, exact zeros elsewhere."""
    O, I = shape
    n, m, words = int(params["n"]), int(params["m"]), tensors["weight_packed"]
    compact, zero = (O, I // m * n), tensors.get("weight_zero_point")
    kept = int_grouped.dequantize(words, tensors["weight_scale"], zero, int(params["bits"]), compact)
    out = torch.empty(shape, dtype=torch.float32, device=words.device)
    return _sparse.scatter(kept, _sparse.unpack_positions(tensors["meta"], n, m, I), n, m, out)


def linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias, in x's dtype: W is dequantized in fp32 and then rounded to that dtype."""
    return F.linear(x, dequantize(tensors, params, shape).to(x.dtype), bias)

"""y = x Wᵀ + bias for a weight of thin factors and kept columns: `prepare` once after loading, then `linear`.

x's columns are gathered once, then two products are taken, the second with B and the kept columns side by side. Path `cpu` is our
C++ library, in one call; `factors` does the same in torch, and is what many rows of x take where the factors are plain. Quantized
ones run by `int_grouped`'s paths. The weight B A + W_s P_I is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from compress_kernels import _sparse, backend, int_grouped
from compress_kernels.lowrank_sparse import cpu, reference


@dataclass(frozen=True, slots=True)
class Prepared:
    """One weight, ready to run."""

    path: str  # "cpu" or "factors"; of quantized ones "factors+" and theirs
    order: torch.Tensor | None  # x's columns: A's, then the kept ones; None where they are x's own
    inside: int  # how many of them are A's
    A: torch.Tensor | int_grouped.Prepared | None
    U: torch.Tensor | int_grouped.Prepared
    group: int = 1  # rows of A and U are padded to multiples
    native: cpu.Weight | None = None

    @property
    def reasons(self) -> Mapping[str, str]:
        """Faster path of quantized factors -> why it cannot run."""
        return {} if isinstance(self.U, torch.Tensor) else self.U.reasons

    @property
    def spare(self) -> bool:
        """Whether the artifact's tensors need not stay in memory: what these paths read of them is held here."""
        return True


def prepare(
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """Make a weight of `shape` (O, I), given as the artifact's tensors, ready for activations of `dtype`.

    Damaged tensors raise a ValueError. `exact` keeps to paths that equal the reference up to the order of summation.
    """
    _sparse.refuse(reference.problems(tensors, params, shape), shape)
    rank, kept, inside = reference.sizes(params, shape)
    columns = tensors.get("columns")
    some = next(iter(tensors.values()))
    I, J = reference.split(columns, shape[1], some.device)
    if not kept or inside == 0:
        order = None
    elif inside == shape[1]:
        order = torch.cat([torch.arange(shape[1], device=some.device), I])
    else:
        order = torch.cat([J, I])
    if not rank:
        order, inside = (None if kept == shape[1] else I), 0
    if "value_bits" not in params:
        A, U = reference.factors(tensors, params, shape)
        A, U = A.to(dtype), U.to(dtype)
        plain = cpu.make(shape, order, inside, kept, A if rank else None, U) if _native(dtype, U.device, rank, inside) else None
        return Prepared("cpu" if plain else "factors", order, inside, A if rank else None, U, native=plain)
    quantized = {}
    for name, rows, length in (("A", rank, inside), ("U", shape[0], rank + kept)):
        if f"{name}_packed" in tensors:
            own = {"bits": params["value_bits"], "group_size": params["value_group"]}
            words = {"weight_packed": tensors[f"{name}_packed"], "weight_scale": tensors[f"{name}_scale"]}
            size = rows, reference.padded(length, int(params["value_group"]))
            quantized[name] = int_grouped.prepare(words, own, size, dtype, exact)
    first, second = quantized.get("A"), quantized["U"]
    ready = second.native is not None and (first is None or first.native is not None) and _native(dtype, some.device, rank, inside)
    coded = cpu.make(shape, order, inside, kept, first and first.native, second.native) if ready and second.native else None
    return Prepared(f"factors+{second.path}", order, inside, first, second, int(params["value_group"]), coded)


def _native(dtype: torch.dtype, device: torch.device, rank: int, inside: int) -> bool:
    return cpu.can_run(dtype, device) is None and backend("cpu", "cpu-exact", "tiled") != "tiled" and not (rank and not inside)


def _product(x: torch.Tensor, W: torch.Tensor | int_grouped.Prepared, group: int, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(W, torch.Tensor):
        return F.linear(x, W, bias)
    return int_grouped.linear(F.pad(x, (0, -x.shape[-1] % group)), W, bias)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    p = prepared
    if p.native is not None and cpu.serves(x, p.native):
        return cpu.linear(x, p.native, bias)
    if p.order is not None:
        x = x.index_select(-1, p.order)
    if p.A is None:
        return _product(x, p.U, p.group, bias)
    h = _product(x[..., : p.inside], p.A, p.group, None)
    if x.shape[-1] > p.inside:
        h = torch.cat([h, x[..., p.inside :]], -1)
    return _product(h, p.U, p.group, bias)

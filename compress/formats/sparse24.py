"""N of every M consecutive inputs, 2:4 above all, with exact 16-bit values and their positions. Our own loader only.

Layout for W (O, I), params n and m, p = ceil(log2 m) bits per position, at least 1; E is F16 or BF16, the checkpoint's dtype
(F16 for F32):

    values  E (O, I*n/m)                   the kept values, in the order of their columns
    meta    uint8 (O, ceil(I/m*n*p/8))     their columns in their groups, 0..m-1, ascending in each group, LSB first along the row

2:4 keeps two groups in a byte, the first in the low nibble: idx0 + 4 * idx1, the code of PyTorch's and CUTLASS' semi-structured
kernels (pytorch `torch/sparse/_semi_structured_conversions.py`), in rows that are not reordered. 9 bits per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compress_kernels import _sparse
from compress_kernels.sparse24 import reference

from compress.errors import CompressError
from compress.formats import int_grouped, int_grouped_outliers
from compress.types import Packed, TensorSpec, Trainable

KIND = "sparse24"
VERSION = 1

value_dtype = int_grouped_outliers.value_dtype
bits_per_weight = int_grouped.bits_per_weight


def check(why: str | None) -> None:
    """Raise the error that params do not fit a linear, if there is a reason."""
    if why is not None:
        raise CompressError(why, hint="use another pattern, or --ignore this linear", usage=True)


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I) of a checkpoint of safetensors dtype `dtype`."""
    n, m = int(params["n"]), int(params["m"])
    check(_sparse.unfit(n, m, shape[1]))
    return {
        "values": (value_dtype(dtype), (shape[0], shape[1] // m * n)),
        "meta": ("U8", _sparse.meta_shape(n, m, shape)),
    }


def complete_mask(W: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """(O, I) bool with exactly n True in every m columns, all non-zeros of W (O, I), of any dtype, among them.

    A group with fewer non-zeros is filled as PyTorch's packer fills 2:4 (only column 0 -> {0, 2}, only 1 -> {1, 2}, only 2,
    only 3 or none -> {2, 3}); other patterns take the highest free columns. A group with more than n raises.
    """
    check(_sparse.unfit(n, m, W.shape[1]))
    order = torch.tensor([2, 3, 1, 0] if (n, m) == (2, 4) else range(m - 1, -1, -1), device=W.device)
    kept = (W != 0).reshape(W.shape[0], -1, m).index_select(2, order)
    count = kept.sum(-1, dtype=torch.uint8)
    _refuse(count > n, count, n, m, "weights that are not zero")
    free = ~kept
    kept |= free & (free.cumsum(-1, dtype=torch.uint8) <= (n - count).unsqueeze(-1))
    return kept.index_select(2, order.argsort()).view(W.shape)


def _refuse(wrong: torch.Tensor, count: torch.Tensor, n: int, m: int, what: str) -> None:
    """Name the first group of (O, I/m) that is `wrong`, with its count (O, I/m) of `what`."""
    if bool(wrong.any()):
        row, group = wrong.nonzero()[0].tolist()
        where = f"row {row}, columns {group * m} to {group * m + m - 1}"
        raise CompressError(f"{where}: {int(count[row, group])} {what}, {n}:{m} keeps {n}")


def uncovered(W: torch.Tensor, mask: torch.Tensor) -> None:
    """Raise where a weight of W (O, I) that is not zero lies outside the mask (O, I)."""
    lost = (W != 0) & ~mask
    if bool(lost.any()):
        row, column = lost.nonzero()[0].tolist()
        raise CompressError(f"row {row}, column {column}: the weight {float(W[row, column]):g} lies outside the mask")


def positions(mask: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Positions (O, I*n/m) uint8 of the kept weights of a mask (O, I) bool; a group that has not exactly n of them raises."""
    check(_sparse.unfit(n, m, mask.shape[1]))
    count = mask.reshape(mask.shape[0], -1, m).sum(-1, dtype=torch.uint8)
    _refuse(count != n, count, n, m, "weights kept")
    return _sparse.positions(mask, n, m)


def mask_of(at: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The mask (O, I) bool of the positions at (O, I*n/m)."""
    mask = torch.empty(len(at), at.shape[1] // n * m, dtype=torch.bool, device=at.device)
    return _sparse.scatter(torch.ones_like(at, dtype=torch.bool), at, n, m, mask)


def pack(W: torch.Tensor, mask: torch.Tensor, *, n: int, m: int) -> Packed:
    """Pack W (O, I), 16-bit or, on the way to a dense export, fp32, by a mask (O, I) bool; a kept weight may be 0.

    A negative zero is stored as zero.

    A group that has not exactly n kept weights, or a weight outside the mask that is not zero, raises: nothing is dropped.
    """
    assert W.dtype in (torch.float16, torch.bfloat16, torch.float32), "values are 16-bit; 32-bit ones are never written"
    shape = (int(W.shape[0]), int(W.shape[1]))
    at = positions(mask, n, m)
    uncovered(W, mask)
    values = _sparse.gather(W, at, n, m) + 0.0  # -0.0 + 0.0 is 0.0
    tensors = {"values": values, "meta": _sparse.pack_codes(at, _sparse.position_bits(m))}
    return Packed(KIND, VERSION, {"n": n, "m": m}, tensors, shape)


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept values (O, I*n/m) and the mask (O, I) bool: exactly what was packed."""
    n, m = int(packed.params["n"]), int(packed.params["m"])
    at = _sparse.unpack_positions(packed.tensors["meta"], n, m, packed.shape[1])
    return packed.tensors["values"], mask_of(at, n, m)


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I) in fp32."""
    return reference.dequantize(packed.tensors, packed.params, packed.shape)


def trainable(packed: Packed) -> Trainable:
    """The kept values may change, the mask may not."""
    values, mask = unpack(packed)
    dtype = values.dtype
    return Trainable(
        {"W": dequantize(packed)},
        lambda parts: parts["W"] * mask.to(parts["W"].device),
        lambda parts: pack((parts["W"].cpu() * mask).to(dtype), mask, n=int(packed.params["n"]), m=int(packed.params["m"])),
    )  # fmt: skip


def problems(packed: Packed) -> list[str]:
    """What is wrong with the tensors; empty where they can be used. `unpack` and `dequantize` do not look."""
    return reference.problems(packed.tensors, packed.params, packed.shape)

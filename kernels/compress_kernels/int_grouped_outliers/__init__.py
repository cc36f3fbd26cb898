"""y = x Wᵀ + bias for grouped integers with exact outliers: `prepare` once after loading, then `linear`.

Paths: `triton` (a GPU; 16-bit activations), `cpu` and `cpu-exact` (our C++ library, outliers and all; as for `int_grouped`),
`int4pack+csr` (torch's CPU kernel, and the outliers' own product added to it) and `tiled` (anything, anywhere); `reference`
defines what they compute.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress_kernels.int_grouped import choose, cpu, cpu_int4
from compress_kernels.int_grouped import reference as int_grouped
from compress_kernels.int_grouped import triton as int_grouped_triton
from compress_kernels.int_grouped_outliers import csr, reference, tiled, triton

logger = logging.getLogger(__name__)

FAST = "int4pack+csr"
PATHS = ("cpu", "cpu-exact", FAST, "tiled")


@dataclass(frozen=True, slots=True)
class Prepared:
    """One weight, ready to run: what the chosen path needs. `tensors` as in `int_grouped.Prepared`."""

    path: str  # "triton", "cpu", "cpu-exact", "int4pack+csr" or "tiled"
    bits: int
    group_size: int
    rows: int  # per tile
    tensors: Mapping[str, Any] = field(default_factory=dict)  # empty where they are never read
    parts: tiled.Parts | None = None  # "tiled"
    int4: tuple[torch.Tensor, torch.Tensor] | None = None
    outliers: csr.Outliers | None = None
    native: cpu.Weight | None = None
    gpu: int_grouped_triton.Weight | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)  # faster path -> why it cannot run

    @property
    def spare(self) -> bool:
        """Whether the artifact's tensors need not stay in memory."""
        return self.path != "tiled"


def prepare(
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """Choose a path for a weight of `shape` (O, I), given as the artifact's tensors, and activations of `dtype`.

    Outliers that are damaged raise a ValueError. `exact` keeps to paths that equal the reference up to the order of
    summation.
    """
    bits, group_size = int(params["bits"]), int(params["group_size"])
    words, packed_zero = tensors["weight_packed"], tensors.get("weight_zero_point")
    outliers = tensors["outlier_indptr"], tensors["outlier_index"], tensors["outlier_value"]
    damage = reference.problems(*outliers, shape)
    if damage:
        raise ValueError(f"weight of shape {shape[0]} x {shape[1]}: {'; '.join(damage)}")
    second = "weight_scale" not in tensors
    rows = tiled.tile_rows(shape, words.device)
    if group_size == -1:
        group_size = shape[1]
    reasons: dict[str, str] = {}
    zero = None if packed_zero is None else int_grouped.zeros(packed_zero, bits, shape[0])
    why = int_grouped_triton.refused(triton.can_run(bits, group_size, shape, dtype, words.device), exact)
    if why is None:
        gpu = triton.weight(tensors, words, zero, shape, bits, dtype)
        return Prepared("triton", bits, group_size, rows, tensors, gpu=gpu)
    if words.device.type != "cpu":
        reasons["triton"] = why
    unable = "exact results were asked for" if exact else _why_not(bits, group_size, shape, dtype, words.device, second)
    path, why_not, why = choose("int_grouped_outliers", bits, group_size, shape, dtype, words.device, exact, unable)
    reasons |= why_not
    if path in ("cpu", "cpu-exact"):
        scale = reference.stored_scales(tensors, shape[0])
        native = cpu.prepare(words, scale, zero, shape, bits, exact=path == "cpu-exact", outliers=outliers)
        return Prepared(path, bits, group_size, rows, tensors if native.exact else {}, native=native, reasons=reasons)
    if path == "tiled":
        _say_once(FAST if words.device.type == "cpu" else "triton", reasons.get("triton", why))
        return Prepared("tiled", bits, group_size, rows, tensors, _parts(tensors, rows), reasons={**reasons, FAST: why})
    int4 = cpu_int4.prepare(words, tensors["weight_scale"], zero, shape)
    return Prepared(FAST, bits, group_size, rows, tensors, int4=int4, outliers=csr.prepare(*outliers), reasons=reasons)


def _parts(tensors: Mapping[str, Any], rows: int) -> tiled.Parts:
    """The artifact's tensors as the tiled path takes them."""
    return tiled.Parts(
        tensors["weight_packed"],
        tensors["weight_scale" if "weight_scale" in tensors else "weight_scale_packed"],
        tensors.get("weight_scale_offset"),
        tensors.get("weight_scale_step"),
        tensors.get("weight_zero_point"),
        tensors["outlier_indptr"],
        tensors["outlier_index"],
        tensors["outlier_value"],
        tiled.starts(tensors["outlier_indptr"], rows),
    )


def _why_not(
    bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, second: bool
) -> str | None:
    """None, or the reason why int4pack cannot serve the dense part."""
    why = cpu_int4.can_run(bits, group_size, shape, dtype, device)
    return "scales have a second level, int4pack has none" if why is None and second else why


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    p = prepared
    if p.gpu is not None and x.dtype != torch.float64:
        return int_grouped_triton.linear(x, p.gpu, bias)
    if p.native is not None and (not p.native.exact or x.numel() <= cpu.ROWS_EXACT * x.shape[-1]):
        return cpu.linear(x, p.native, bias)
    few = x.dtype == torch.bfloat16 and x.numel() <= cpu_int4.ROWS_OF_X * x.shape[-1]
    if p.int4 is not None and p.outliers is not None and few:
        flat = x.reshape(-1, x.shape[-1]).contiguous()  # int4pack refuses strides
        y = cpu_int4.linear(flat, *p.int4, p.group_size, None) + csr.product(flat, p.outliers)
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
    tensors = p.tensors if p.gpu is None else {name: t.to(x.device) for name, t in p.tensors.items()}  # they may be pages of a file
    return tiled.linear(x, *(p.parts or _parts(tensors, p.rows)), bias, p.bits, p.rows)


@functools.cache
def _say_once(path: str, why: str) -> None:
    logger.info("int_grouped_outliers: the tiled path runs, not %s: %s", path, why)

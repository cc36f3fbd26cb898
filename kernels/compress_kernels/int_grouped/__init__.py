"""y = x Wᵀ + bias for weights of grouped integers: `prepare` once after loading, then `linear`.

Paths: `triton` (a GPU; 16-bit activations), `cpu` (our C++ library with int8 activations; the default for 16-bit activations),
`cpu-exact` (the same without; for fp32 ones), `int4pack` (torch's CPU kernel: 4 bits, bf16, few tokens) and `tiled` (anything,
anywhere); the first that can run is taken, or what COMPRESS_BACKEND says. `reference` defines what they compute.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress_kernels import backend
from compress_kernels.int_grouped import cpu, cpu_int4, reference, tiled, triton

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One weight, ready to run: the artifact's words, unpacked zero points, and what the chosen path needs."""

    path: str  # "triton", "cpu", "cpu-exact", "int4pack" or "tiled"
    bits: int
    group_size: int
    words: torch.Tensor  # (O, K) int32
    scale: torch.Tensor  # (O, G)
    zero: torch.Tensor | None  # (O, G) uint8; None where symmetric
    int4: tuple[torch.Tensor, torch.Tensor] | None = None
    native: cpu.Weight | None = None
    gpu: triton.Weight | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)  # faster path -> why it cannot run


def prepare(
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """Choose a path for a weight of `shape` (O, I), given as the artifact's tensors, and activations of `dtype`.

    `exact` keeps to paths that equal the reference up to the order of summation.
    """
    bits, group_size = int(params["bits"]), int(params["group_size"])
    words, scale, packed_zero = tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point")
    zero = None if packed_zero is None else reference.zeros(packed_zero, bits, shape[0])
    if group_size == -1:
        group_size = shape[1]
    reasons: dict[str, str] = {}
    chosen = backend("triton", "cpu", "cpu-exact", "int4pack", "tiled")
    why = triton.refused(triton.can_run(bits, group_size, shape, dtype, words.device), chosen, exact)
    if why is None:
        gpu = triton.prepare(words, scale, zero, shape, bits)
        return Prepared("triton", bits, group_size, words, scale, zero, gpu=gpu)
    if words.device.type != "cpu":
        reasons["triton"] = why
    for path in ("cpu-exact",) if exact or dtype == torch.float32 else ("cpu", "cpu-exact"):
        why = cpu.can_run(bits, group_size, shape, dtype, words.device)
        if exact and chosen != path:
            why = "exact results were asked for"
        if why is None and chosen not in (None, path):
            why = f"COMPRESS_BACKEND is {chosen}"
        if why is None:
            native = cpu.prepare(words, scale, zero, shape, bits, exact=path == "cpu-exact")
            return Prepared(path, bits, group_size, words, scale, zero, native=native, reasons=reasons)
        reasons[path] = why
    why = "exact results were asked for" if exact else cpu_int4.can_run(bits, group_size, shape, dtype, words.device)
    if why is None and chosen not in (None, "int4pack"):
        why = f"COMPRESS_BACKEND is {chosen}"
    if why is None:
        int4 = cpu_int4.prepare(words, scale, zero, shape)
        return Prepared("int4pack", bits, group_size, words, scale, zero, int4, reasons=reasons)
    _say_once("int4pack" if words.device.type == "cpu" else "triton", reasons.get("triton", why))
    return Prepared("tiled", bits, group_size, words, scale, zero, reasons={**reasons, "int4pack": why})


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    p = prepared
    if p.gpu is not None and x.dtype != torch.float64:
        return triton.linear(x, p.gpu, bias)
    if p.native is not None and (not p.native.exact or x.numel() <= cpu.ROWS_EXACT * x.shape[-1]):
        return cpu.linear(x, p.native, bias)
    if p.int4 is not None and x.dtype == torch.bfloat16 and x.numel() <= cpu_int4.ROWS_OF_X * x.shape[-1]:
        return cpu_int4.linear(x, *p.int4, p.group_size, bias)
    return tiled.linear(x, p.words, p.scale, p.zero, bias, p.bits)


@functools.cache
def _say_once(path: str, why: str) -> None:
    logger.info("int_grouped: the tiled path runs, not %s: %s", path, why)

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

from compress_kernels import backend, dispatch
from compress_kernels.int_grouped import cpu, cpu_int4, reference, tiled, triton

logger = logging.getLogger(__name__)
PATHS = ("cpu", "cpu-exact", "int4pack", "tiled")


@dataclass(frozen=True, slots=True)
class Prepared:
    """One weight, ready to run: what the chosen path needs.

    `tensors` are the artifact's, in the caller's own mapping. A path with its own layout looks them up there only for many rows
    of x, at the moment that it reads them: the caller may put them aside meanwhile (`spare`).
    """

    path: str  # "triton", "cpu", "cpu-exact", "int4pack" or "tiled"
    bits: int
    group_size: int
    tensors: Mapping[str, torch.Tensor | None] = field(default_factory=dict)  # empty where they are never read
    zero: torch.Tensor | None = None  # "tiled": (O, G) uint8; None where symmetric
    int4: tuple[torch.Tensor, torch.Tensor] | None = None
    native: cpu.Weight | None = None
    gpu: triton.Weight | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)  # faster path -> why it cannot run

    @property
    def spare(self) -> bool:
        """Whether the artifact's tensors need not stay in memory."""
        return self.path != "tiled"


def prepare(
    tensors: Mapping[str, torch.Tensor | None],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    exact: bool = False,
) -> Prepared:
    """Choose a path for a weight of `shape` (O, I), given as the artifact's tensors, and activations of `dtype`.

    `exact` keeps to paths that equal the reference up to the order of summation.
    """
    bits, group_size = int(params["bits"]), int(params["group_size"])
    words, scale, packed_zero = _parts(tensors)
    zero = None if packed_zero is None else reference.zeros(packed_zero, bits, shape[0])
    if group_size == -1:
        group_size = shape[1]
    reasons: dict[str, str] = {}
    why = triton.refused(triton.can_run(bits, group_size, shape, dtype, words.device), exact)
    if why is None:
        return Prepared("triton", bits, group_size, tensors, gpu=triton.prepare(words, scale, zero, shape, bits, dtype=dtype))
    if words.device.type != "cpu":
        reasons["triton"] = why
    unable = "exact results were asked for" if exact else cpu_int4.can_run(bits, group_size, shape, dtype, words.device)
    path, why_not, why = choose("int_grouped", bits, group_size, shape, dtype, words.device, exact, unable)
    reasons |= why_not
    if path in ("cpu", "cpu-exact"):
        native = cpu.prepare(words, scale, zero, shape, bits, exact=path == "cpu-exact")
        return Prepared(path, bits, group_size, tensors if native.exact else {}, native=native, reasons=reasons)
    if path == "int4pack":
        int4 = cpu_int4.prepare(words, scale, zero, shape)
        return Prepared("int4pack", bits, group_size, tensors, int4=int4, reasons=reasons)
    _say_once("int4pack" if words.device.type == "cpu" else "triton", reasons.get("triton", why))
    return Prepared("tiled", bits, group_size, tensors, zero, reasons={**reasons, "int4pack": why})


def choose(
    kind: str, bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, exact: bool,
    unable: str | None,
) -> tuple[str, dict[str, str], str]:  # fmt: skip
    """The path off a GPU, why the C++ ones before it do not run, and why int4pack does not (empty where it was not asked).

    `unable` says why int4pack cannot run.
    """
    chosen, because = _wanted(kind, bits, dtype, shape, exact, unable)
    reasons: dict[str, str] = {}
    for path in ("cpu-exact",) if exact or dtype == torch.float32 else ("cpu", "cpu-exact"):
        why = cpu.can_run(bits, group_size, shape, dtype, device)
        if exact and chosen != path:
            why = "exact results were asked for"
        if why is None and chosen not in (None, path):
            why = because
        if why is None:
            return path, reasons, ""
        reasons[path] = why
    why = because if unable is None and chosen not in (None, "int4pack") else unable
    return ("int4pack", reasons, "") if why is None else ("tiled", reasons, why)


def _wanted(
    kind: str, bits: int, dtype: torch.dtype, shape: tuple[int, int], exact: bool, unable: str | None
) -> tuple[str | None, str]:  # fmt: skip
    """The path that COMPRESS_BACKEND, or else this machine's table, asks for, and why the others then do not run.

    `unable` says why int4pack cannot run; a table that names it is passed over then.
    """
    asked = backend(*PATHS)
    if asked is not None or exact:
        return asked, f"COMPRESS_BACKEND is {asked}"
    best = dispatch.preferred(kind, bits, dtype, shape)
    if best not in PATHS or (best == "int4pack" and unable is not None):
        return None, ""
    return best, dispatch.TUNED.format(best)


def _parts(tensors: Mapping[str, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Words (O, K) int32, scale (O, G) and packed zero points, None where symmetric."""
    words, scale = tensors["weight_packed"], tensors["weight_scale"]
    assert words is not None
    assert scale is not None
    return words, scale, tensors.get("weight_zero_point")


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    p = prepared
    if p.gpu is not None and x.dtype != torch.float64:
        return triton.linear(x, p.gpu, bias)
    if p.native is not None and (not p.native.exact or x.numel() <= cpu.ROWS_EXACT * x.shape[-1]):
        return cpu.linear(x, p.native, bias)
    if p.int4 is not None and x.dtype == torch.bfloat16 and x.numel() <= cpu_int4.ROWS_OF_X * x.shape[-1]:
        return cpu_int4.linear(x, *p.int4, p.group_size, bias)
    tensors = p.tensors
    if p.gpu is not None:  # they may be on the CPU, as pages of a file
        tensors = {name: None if t is None else t.to(x.device) for name, t in tensors.items()}
    words, scale, packed_zero = _parts(tensors)
    zero = p.zero if packed_zero is None or p.zero is not None else reference.zeros(packed_zero, p.bits, len(words))
    return tiled.linear(x, words, scale, zero, bias, p.bits)


def rows(
    tensors: Mapping[str, torch.Tensor | None], params: Mapping[str, Any], shape: tuple[int, int], index: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Rows index (N,) of a weight of `shape` (O, I), given as the artifact's tensors: (N, I) fp32, the reference's bit for bit."""
    words, scale, packed_zero = _parts(tensors)
    bits = int(params["bits"])
    zero = None if packed_zero is None else reference.zeros_of(packed_zero, bits, index)
    return tiled.dequantize(words[index], scale[index], zero, bits, scale.new_empty(len(index), shape[1], dtype=torch.float32))


@functools.cache
def _say_once(path: str, why: str) -> None:
    logger.info("int_grouped: the tiled path runs, not %s: %s", path, why)

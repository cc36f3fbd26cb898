"""Correctness of every GPU kernel against fp64 on the device at hand (or in the interpreter): what benchmarks/gpu.py runs first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from compress_kernels import bits as bitpack
from compress_kernels import gpu_table, hadamard
from compress_kernels.gpu_table import Choice
from compress_kernels.hadamard import matrices
from compress_kernels.hadamard import reference as hadamard_reference
from compress_kernels.int_grouped import fused, reference, triton
from compress_kernels.int_grouped_outliers import triton as outliers

CLOSE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}  # one rounding of the outputs: 2^-11 and 2^-8 at most


class Weight:
    """A random weight (O, I), its dense fp64 values and what the kernel makes of it; `share` of outliers, `rows` with many."""

    def __init__(
        self, O: int, I: int, bits: int, group: int, dtype: torch.dtype, device: torch.device, *, symmetric: bool = False,
        share: float = 0.0, rows: tuple[int, ...] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed + O + I + bits)
        G = I // (group or I)
        q = torch.randint(0, 1 << bits, (O, I), generator=g, dtype=torch.uint8)
        z = torch.full((O, G), 1 << bits - 1) if symmetric else torch.randint(0, 1 << bits, (O, G), generator=g)
        scale = ((torch.rand(O, G, generator=g) + 0.5) / (2**bits * I**0.5)).to(dtype)
        zero = z.to(torch.uint8).repeat_interleave(I // G, 1)
        side = None
        kept = torch.rand(O, I, generator=g) < share
        for row in rows:
            kept[row] = torch.rand(I, generator=g) < 0.35
        if share:
            q = torch.where(kept, zero, q)
            value = torch.randn(int(kept.sum()), generator=g).to(dtype) * 0.3
            indptr = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
            side = outliers.prepare(indptr.to(device), kept.nonzero()[:, 1].to(torch.int32).to(device), value.to(device), (O, I))
        words = bitpack.pack(q, bits)
        zeros = bitpack.pack(z.to(torch.uint8).T, bits).T.contiguous()
        self.dense = reference.dequantize(words, scale, zeros, bits, (O, I)).double()
        if share:
            self.dense[kept] = value.double()
        self.dense = self.dense.to(device)
        points = None if symmetric else z.to(torch.uint8).to(device)
        self.packed = triton.prepare(words.to(device), scale.to(device), points, (O, I), bits, side)


def _inputs(M: int, I: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(M, I, generator=torch.Generator().manual_seed(M)).to(dtype).to(device)


def _error(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


def _row(what: str, dtype: torch.dtype, error: float, most: float, **more: Any) -> dict[str, Any]:
    good = error <= most  # NaN is not
    return {"check": what, "dtype": str(dtype).removeprefix("torch."), **more, "error": error, "most": most, "good": good}


def _product(what: str, w: Weight, M: int, dtype: torch.dtype, how: Choice, bias: bool = False) -> dict[str, Any]:
    """One product into a poisoned output, twice: against fp64, the same bits again, and counters back at 0."""
    O, I = w.packed.shape
    x = _inputs(M, I, dtype, w.dense.device)
    b = torch.linspace(-1, 1, O).to(dtype).to(x.device) if bias else None
    y, again = (torch.full((M, O), float("nan"), dtype=dtype, device=x.device) for _ in range(2))
    triton.run(x, w.packed, b, y, how)
    triton.run(x, w.packed, b, again, how)
    want = F.linear(x.double(), w.dense, None if b is None else b.double())
    most = CLOSE[dtype] * (1 if how.path == "fused" else 2)  # a decoded weight is rounded too
    error = _error(y, want)
    if not torch.equal(y, again) or bool(w.packed.locks.any()):
        error = float("inf")
    return _row(what, dtype, error, most, shape=[O, I], M=M, path=how.path, BM=how.BM, BN=how.BN, split=how.split)


def checks(device: torch.device, types: tuple[torch.dtype, ...], small: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of {check, dtype, error, most, good, …}; `small`: fewer, for the interpreter."""
    widths = (4, 3) if small else (2, 3, 4, 8)
    groups = (64, 0) if small else (32, 64, 128, 0)
    for dtype in types:
        for bits in widths:
            for number, group in enumerate(groups):
                w = Weight(257, 384 if group else 300, bits, group, dtype, device, symmetric=number % 2 == 1)
                M = (1, 17, 16, 3)[number]
                yield _product(f"W{bits} g{group or 'row'}", w, M, dtype, gpu_table.default(bits, w.packed.shape, M, 132))
        yield from _ways(device, dtype, small)
        yield from _decoded(device, dtype, widths)
        yield from _side_cars(device, dtype, small)
        yield from _fused(device, dtype)
        yield from _rotations(device, dtype, small)
        if device.type == "cuda":
            yield from _captured(device, dtype)


def _ways(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[dict[str, Any]]:
    """W4 g128: every block size, splits, awkward numbers of rows, a bias; NaN in one row; x with gaps."""
    w = Weight(300, 640, 4, 128, dtype, device)
    plan = [(1, Choice("fused", 16, 128, split=3)), (17, Choice("fused", 32, 64, split=5)), (64, Choice("fused", 64, stages=3))]
    if not small:
        plan += [(3, Choice("fused", 16, 64)), (65, Choice("fused", 64, 64, stages=3, split=2))]
        plan += [(200, Choice("fused", 128, 128, 8, 3)), (300, Choice("fused", 256, 64, 8, 3)), (700, Choice("scratch"))]
    for M, how in plan:
        yield _product("ways", w, M, dtype, how, bias=True)
    for ahead in (False, True):  # three slabs, by turns in two buffers
        yield _product("slabs", w, 70, dtype, Choice("scratch", slab=640 * 2 * 128, ahead=ahead), bias=True)
    w.packed = replace(w.packed, dense=triton.dequantize(w.packed, 0, torch.empty(384, 640, dtype=dtype, device=device)))
    yield _product("a dense copy", w, 70, dtype, Choice("dense"), bias=True)
    x = _inputs(4, 1280, dtype, device)[:, ::2]
    x[2, 5] = float("nan")
    y = triton.linear(x, w.packed)
    good = bool(y[2].isnan().all()) and not bool(y[[0, 1, 3]].isnan().any())
    error = _error(y[[0, 1, 3]], F.linear(x[[0, 1, 3]].double(), w.dense)) if good else float("inf")
    yield _row("NaN in a row, x with gaps", dtype, error, CLOSE[dtype])


def _decoded(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for bits in widths:
        w = Weight(200, 384, bits, 64, dtype, device)
        out = triton.dequantize(w.packed, 0, torch.full((200, 384), float("nan"), dtype=dtype, device=device))
        cut = dtype == torch.bfloat16 and device.type == "cpu"  # the interpreter does not round to bf16
        most = 6e-3 if cut else 0.0
        yield _row(f"W{bits} decoded", dtype, _error(out, w.dense.to(torch.float32).to(dtype).double()), most)


def _side_cars(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[dict[str, Any]]:
    for rows in ((), (5, 140)):
        w = Weight(200, 1024, 4, 128, dtype, device, share=0.01, rows=rows)
        for M, split in ((1, 1), (17, 3)) if small else ((1, 1), (3, 4), (16, 1), (64, 2)):
            BM = max(16, 1 << (M - 1).bit_length())
            yield _product(f"outliers{', skewed' if rows else ''}", w, M, dtype, Choice("fused", BM, 128, stages=3, split=split))
        yield _product("outliers, scratch", w, 70, dtype, Choice("scratch"))


def _fused(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    weights = [Weight(O, 256, 4, 128, dtype, device, seed=O) for O in (256, 100, 130)]
    x = _inputs(3, 256, dtype, device)
    whole, members = fused.fuse([w.packed for w in weights])
    for w, y in zip(weights, fused.linear(x, whole, members, [None] * 3), strict=True):
        yield _row("fused", dtype, _error(y, F.linear(x.double(), w.dense)), CLOSE[dtype])


def _rotations(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[dict[str, Any]]:
    for n in (256, 48) if small else (128, 4096, 8192, 192, 1280, 11008, 14336):
        base = matrices.base(n)
        base = None if base is None else base.to(device)
        x, up = (_inputs(M, n, dtype, device)[:3] for M in (3, 4))
        for gated in (None, up):
            y = hadamard.transform(x, base, gated)
            want = hadamard_reference.transform(hadamard_reference.activated(x, gated).double(), base)
            roundings = 1 if gated is None else 3
            yield _row(f"hadamard {n}{', gated' * (roundings > 1)}", dtype, _error(y, want), CLOSE[dtype] * roundings)


def _captured(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every way in a CUDA graph, replayed twice with other inputs than those of the capture."""
    w = Weight(300, 640, 4, 128, dtype, device, share=0.01)
    plan = [(1, Choice("fused", 16, 128, split=3)), (17, Choice("fused", 32, 64, split=2))]
    plan += [(70, Choice("scratch", slab=640 * 2 * 128, ahead=ahead)) for ahead in (False, True)]
    for M, how in plan:
        x, y = torch.zeros(M, 640, dtype=dtype, device=device), torch.empty(M, 300, dtype=dtype, device=device)
        triton.run(x, w.packed, None, y, how)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            triton.run(x, w.packed, None, y, how)
        x.copy_(_inputs(M, 640, dtype, device))
        for _ in range(2):
            y.fill_(float("nan"))
            graph.replay()
        error = _error(y, F.linear(x.double(), w.dense))
        yield _row("CUDA graph", dtype, error, CLOSE[dtype] * 2, M=M, path=how.path, split=how.split)

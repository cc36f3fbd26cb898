"""Grouped integers on a GPU: 2, 3, 4 and 8 bits, by Triton (`device.py` draws the layout).

Few rows of x: one launch decodes the weight into the tensor cores' registers and multiplies; the columns are split over
programs where the outputs alone would not fill the GPU. Many: the weight is decoded into a scratch buffer, a slab of rows at a
time so that it stays in the L2 cache, and the vendor's product runs on it, if so chosen with the next slab decoded on a second
stream meanwhile; or the product runs on a dense copy that is kept (`gpu_dense`). `gpu_table` says which, from a table per device.
The result is the product with (q - z) · scale in fp32, rounded once: as near to fp64 as `F.linear` with an unrounded weight; of
decoded weights that with weights rounded to x's type.

A launch counts arrivals in the weight's own counters, so one weight must not run on two streams at a time.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from compress_kernels import backend, gpu_dense, gpu_table
from compress_kernels import bits as bitpack

TILE = 128  # rows of a tile, as in device.py
_FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}
_ROWS = 1024  # rows repacked at a time
_BLOCKS_OF_X = 32  # blocks of rows of x that a split product may have: counters per block of outputs
_TRANSPOSED = 4  # from more rows of x on, outliers read xᵀ
_MOST = 1 << 31  # elements of a tensor that the kernels count in 32 bits


class Outliers(NamedTuple):
    """A tile's outliers: chunks of 8 per row, and runs of 256 of single long rows (int_grouped_outliers/triton.py)."""

    starts: torch.Tensor  # (tiles+1,) int32: first chunk of each tile
    entries: torch.Tensor  # (chunks, 128, 8) int32: column below, value's 16 bits above
    run_starts: torch.Tensor  # (tiles+1,) int32: first run of each tile
    run_rows: torch.Tensor  # (runs,) int32: row in the tile
    runs: torch.Tensor  # (runs, 256) int32
    bf16: bool  # the values' type; else fp16


@dataclass(frozen=True)
class Weight:
    """A weight (O, I) in the kernel's layout."""

    shape: tuple[int, int]
    bits: int
    group: int  # columns of a scale; 0: one scale per row
    words: torch.Tensor  # (tiles, KT, planes, 128, W) int16
    stats: torch.Tensor  # (G, 128·tiles) int32: zero point above, 16-bit scale below; columns may be of a larger one
    scale: torch.Tensor | None  # (G, 128·tiles) fp32, where the scales are; with the rows of `stats`
    bf16: bool  # the type of 16-bit scales; else fp16
    locks: torch.Tensor  # int32 counters, 0 between launches
    outliers: Outliers | None = None
    dense: torch.Tensor | None = None  # (128·tiles, I): the weight decoded, where a copy is kept


@functools.cache
def device_code() -> ModuleType | None:
    """The kernels, or None where Triton is not installed."""
    try:
        from compress_kernels.int_grouped import device
    except ImportError:
        return None
    return device


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were imported: they then run on a CPU, slowly."""
    code = device_code() if "TRITON_INTERPRET" in os.environ else None
    return code is not None and type(code.product).__name__ == "InterpretedFunction"


def can_run(bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason why this path cannot serve a weight of `shape` (O, I) and activations of `dtype`."""
    asked = device.type == "cpu" and os.environ.get("COMPRESS_BACKEND") == "triton"
    if device.type != "cuda" and not (asked and interpreted()):
        return f"the weight is on {device.type}, triton needs a GPU"
    if device_code() is None:
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the decoder is assembly of NVIDIA GPUs"
    if dtype not in (torch.float16, torch.bfloat16) and not (dtype == torch.float32 and interpreted()):
        return f"activations are {str(dtype).removeprefix('torch.')}, triton has float16 and bfloat16"
    if bits not in _FIELDS:
        return f"{bits} bits, triton has 2, 3, 4 and 8"
    if group_size not in (32, 64, 128, shape[1]):
        return f"groups of {group_size}, triton has 32, 64, 128 and whole rows"
    if -(-shape[0] // TILE) * TILE * (-(-shape[1] // 256) * 256) * bits // 16 >= _MOST:
        return f"{shape[0]} x {shape[1]} weights, triton counts to 2^31 words"
    return None


def refused(why: str | None, exact: bool) -> str | None:
    """`can_run`'s reason, or the wish that stands against this path: COMPRESS_BACKEND's, or exact results."""
    chosen = backend("triton", "cpu", "cpu-exact", "int4pack", "tiled")
    if why is None and chosen not in (None, "triton"):
        return f"COMPRESS_BACKEND is {chosen}"
    return "exact results were asked for" if why is None and exact and chosen is None else why


def columns(bits: int, group: int) -> int:
    """Columns of a tile; `group` is 0 for one scale per row."""
    return 256 if bits in (2, 3) else 64 if bits == 8 and group == 32 else 128


def pack(q: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Codes (128 t, I) uint8 as words (t, KT, planes, 128, W) int16; columns beyond I are 0."""
    KB, count = columns(bits, group), _FIELDS[bits]
    q = F.pad(q, (0, -q.shape[1] % KB))
    parts = q.view(-1, TILE, q.shape[1] // KB, count, KB // count).permute(3, 0, 2, 1, 4).to(torch.int32)  # (F, t, KT, 128, W)
    if bits == 3:
        words = [sum(parts[5 * p + f] << 3 * f for f in range(5)) | (parts[15] >> p & 1) << 15 for p in range(3)]
    else:
        words = [sum(parts[i] << bits * i for i in range(count))]
    packed = torch.stack(words, 2)
    return ((packed ^ 0x8000) - 0x8000).to(torch.int16)  # the low 16 bits, read as a signed number


def _by_group(t: torch.Tensor, tiles: int, groups: int) -> torch.Tensor:
    """(O, G) as (groups, 128·tiles), zeros beyond."""
    return F.pad(t, (0, groups - t.shape[1], 0, tiles * TILE - len(t))).T.contiguous()


def prepare(
    words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, shape: tuple[int, int], bits: int,
    outliers: Outliers | None = None, dtype: torch.dtype | None = None,
) -> Weight:  # fmt: skip
    """Repack words (O, K) int32, scale (O, G), zero (O, G) uint8 or None, on their device and in pieces.

    `dtype` is that of a dense copy, which is kept where `gpu_dense` has room for it.
    """
    O, I = shape
    group = 0 if scale.shape[1] == 1 else I // scale.shape[1]
    tiles, KB = -(-O // TILE), columns(bits, group)
    pieces = []
    for part in words.split(_ROWS):
        q = bitpack.unpack(part, bits, I)
        pieces.append(pack(F.pad(q, (0, 0, 0, -len(q) % TILE)), bits, group))
    stats = torch.full(scale.shape, 1 << (bits - 1), device=scale.device) if zero is None else zero
    stats, wide = stats.to(torch.int32) << 16, None
    if scale.dtype in (torch.float16, torch.bfloat16):
        stats |= scale.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    groups = -(-I // KB) * (KB // group) if group else 1
    if scale.dtype not in (torch.float16, torch.bfloat16):
        wide = _by_group(scale.float(), tiles, groups)
    half = scale.dtype == torch.bfloat16
    locks = counters(tiles, words.device)
    w = Weight(shape, bits, group, torch.cat(pieces), _by_group(stats, tiles, groups), wide, half, locks, outliers)
    return w if dtype is None else with_dense(w, dtype)


def counters(tiles: int, device: torch.device) -> torch.Tensor:
    """`locks` of a weight of so many tiles."""
    return torch.zeros(2 * tiles * _BLOCKS_OF_X, dtype=torch.int32, device=device)


def with_dense(w: Weight, dtype: torch.dtype) -> Weight:
    """The weight with a dense copy in `dtype`, if there is room for one."""
    rows = len(w.words) * TILE
    if not gpu_dense.room(rows * w.shape[1] * dtype.itemsize, w.words.device):
        return w
    made = replace(w, dense=dequantize(w, 0, torch.empty(rows, w.shape[1], dtype=dtype, device=w.words.device)))
    gpu_dense.note(made, made.dense)
    return made


def linear(x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    if torch.compiler.is_compiling():
        s = w.outliers
        parts = (None,) * 5 if s is None else s[:5]
        flags = w.bf16, s is not None and s.bf16
        return _op(x, w.words, w.stats, w.scale, bias, w.locks, w.dense, *parts, w.shape[0], w.bits, w.group, *flags)
    return _product(x, w, bias)


def _product(x: torch.Tensor, w: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    O, I = w.shape
    flat = x.reshape(-1, I)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    y = flat.new_empty(len(flat), O)
    if flat.shape[0] and O:
        kept = w.dense is not None and w.dense.dtype == flat.dtype
        how = gpu_table.choose(w.bits, w.group, w.shape, len(flat), flat.device, kept)
        if flat.is_cuda and flat.device.index != torch.cuda.current_device():
            with torch.cuda.device(flat.device):
                run(flat, w, bias, y, how)
        else:
            run(flat, w, bias, y, how)
    return y.view(*x.shape[:-1], O)


def run(x: torch.Tensor, w: Weight, bias: torch.Tensor | None, y: torch.Tensor, how: gpu_table.Choice) -> None:
    """Write x (M, I) Wᵀ + bias to y (M, O), as `how` says. M > 0, and x's columns lie together."""
    if how.path == "dense" and w.dense is not None:
        _multiply(x, w.dense[: w.shape[0]], bias, y)
    elif how.path != "fused" or _beyond(x, w, y, how):
        _through_scratch(x, w, bias, y, how)
    else:
        _fused(x, w, bias, y, how)


def _decoder(dtype: torch.dtype) -> int:
    """DECODE of device.py: assembly; in the interpreter, or for fp32, plain Triton."""
    if dtype == torch.float32 or (interpreted() and dtype == torch.bfloat16):
        return 2
    return 1 if interpreted() else 0


def _beyond(x: torch.Tensor, w: Weight, y: torch.Tensor, how: gpu_table.Choice) -> bool:
    """Whether a position in x, xᵀ or y does not fit the kernel's 32 bits."""
    last, transposed = len(x) - 1, 0 if w.outliers is None else -(-len(x) // how.BM) * how.BM * x.shape[1]
    return max(last * x.stride(0) + x.shape[1], last * y.stride(0) + y.shape[1], transposed) >= _MOST


def _fused(x: torch.Tensor, w: Weight, bias: torch.Tensor | None, y: torch.Tensor, how: gpu_table.Choice) -> None:
    code: Any = device_code()
    (M, K), N = x.shape, w.shape[0]
    tiles, KT = w.words.shape[:2]
    blocks = -(-M // how.BM)
    split = min(how.split, KT) if blocks <= _BLOCKS_OF_X else 1
    split = split if tiles * TILE * blocks * how.BM * split < _MOST else 1
    grid = (tiles * TILE // how.BN, blocks, split)
    work = x.new_empty(grid[0] * blocks * split * how.BN * how.BM, dtype=torch.float32) if split > 1 else y
    s, mode, xt = w.outliers, 0, x
    if s is not None:
        mode = 1 if _TRANSPOSED >= M else 2
        if mode == 2:
            xt = x.new_empty(K, blocks * how.BM)
            xt[:, :M] = x.T
    parts = (w.locks,) * 5 if s is None else s[:5]
    code.product[grid](
        x, w.words, w.stats, w.stats if w.scale is None else w.scale, y if bias is None else bias, y, work, w.locks, xt, *parts,
        M, N, w.stats.stride(0), K, KT, x.stride(0), y.stride(0), xt.stride(0),
        BITS=w.bits, GROUP=w.group, WIDE=w.scale is not None, BF16_SCALES=w.bf16, BM=how.BM, BN=how.BN, SPLIT=split,
        EVEN_K=columns(w.bits, w.group) * KT == K, BIAS=bias is not None, OUTLIERS=mode, BF16_VALUES=s is not None and s.bf16,
        DECODE=_decoder(x.dtype), num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip


def dequantize(w: Weight, first: int, out: torch.Tensor) -> torch.Tensor:
    """Write rows 128·first … of W into out (R, I), rounded to its dtype as the reference rounds, and return it."""
    code: Any = device_code()
    KT, tiles = w.words.shape[1], -(-len(out) // TILE)
    code.dense[(tiles, KT)](
        w.words, w.stats, w.stats if w.scale is None else w.scale, out, first, first * TILE + len(out),
        w.stats.stride(0), w.shape[1], KT,
        BITS=w.bits, GROUP=w.group, WIDE=w.scale is not None, BF16_SCALES=w.bf16, DECODE=_decoder(out.dtype), num_warps=4,
    )  # fmt: skip
    if w.outliers is not None:
        code.put[(tiles,)](*w.outliers[:5], out, first, w.shape[1], BF16_VALUES=w.outliers.bf16, num_warps=4)
    return out


def _multiply(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, W.T, out=out)
    else:
        torch.addmm(bias, x, W.T, out=out)


@functools.cache
def _second_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def _through_scratch(x: torch.Tensor, w: Weight, bias: torch.Tensor | None, y: torch.Tensor, how: gpu_table.Choice) -> None:
    O, I = w.shape
    rows = max(1, how.slab // (x.element_size() * I * TILE)) * TILE if how.slab else O
    starts = range(0, O, rows)
    ahead = how.ahead and len(starts) > 1
    scratch = [x.new_empty(min(rows, O), I) for _ in range(1 + ahead)]
    side = main = None
    if ahead and x.is_cuda:
        main, side = torch.cuda.current_stream(x.device), _second_stream(x.device.index)
        side.wait_stream(main)
    multiplied: list[torch.cuda.Event] = []
    for i, start in enumerate(starts):
        stop = min(start + rows, O)
        if side is not None and i > 1:
            side.wait_event(multiplied[i - 2])  # the buffer is in use until then
        with nullcontext() if side is None else torch.cuda.stream(side):
            W = dequantize(w, start // TILE, scratch[i % len(scratch)][: stop - start])
        if main is not None and side is not None:
            main.wait_stream(side)
        _multiply(x, W, None if bias is None else bias[start:stop], y[:, start:stop])
        if main is not None:
            multiplied.append(main.record_event())


@torch.library.custom_op("compress_kernels::int_grouped_triton", mutates_args=())
def _op(
    x: torch.Tensor, words: torch.Tensor, stats: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None,
    locks: torch.Tensor, dense: torch.Tensor | None, starts: torch.Tensor | None, entries: torch.Tensor | None,
    run_starts: torch.Tensor | None, run_rows: torch.Tensor | None, runs: torch.Tensor | None, outputs: int, bits: int, group: int,
    bf16_scales: bool, bf16_values: bool,
) -> torch.Tensor:  # fmt: skip
    s = None
    if starts is not None and entries is not None and run_starts is not None and run_rows is not None and runs is not None:
        s = Outliers(starts, entries, run_starts, run_rows, runs, bf16_values)
    return _product(x, Weight((outputs, x.shape[-1]), bits, group, words, stats, scale, bf16_scales, locks, s, dense), bias)


@_op.register_fake
def _(
    x: torch.Tensor, words: torch.Tensor, stats: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None,
    locks: torch.Tensor, dense: torch.Tensor | None, starts: torch.Tensor | None, entries: torch.Tensor | None,
    run_starts: torch.Tensor | None, run_rows: torch.Tensor | None, runs: torch.Tensor | None, outputs: int, bits: int, group: int,
    bf16_scales: bool, bf16_values: bool,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], outputs)

"""Grouped integers on a GPU: 2, 3, 4 and 8 bits, by Triton (`device.py` draws the layout).

Few rows of x: one launch decodes the weight into the tensor cores' registers and multiplies; the columns are split over
programs where the outputs alone would not fill the GPU. Many: the weight is decoded into a scratch buffer, a slab of rows at a
time so that it stays in the L2 cache, and the vendor's product runs on it. `gpu_table` says which, from a table per device. The
result is the product with (q - z) · scale in fp32, rounded once: as near to fp64 as `F.linear` with an unrounded weight.

A launch counts arrivals in the weight's own counters, so one weight must not run on two streams at a time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from compress_kernels import backend, gpu_table
from compress_kernels import bits as bitpack

TILE = 128  # rows of a tile, as in device.py
_FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}
_ROWS = 1024  # rows repacked at a time
_BLOCKS_OF_X = 32  # blocks of rows of x that a split product may have: counters per block of outputs
_TRANSPOSED = 4  # from more rows of x on, outliers read xᵀ


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
    stats: torch.Tensor  # (G, 128·tiles) int32: zero point above, 16-bit scale below
    scale: torch.Tensor | None  # (G, 128·tiles) fp32, where the scales are
    bf16: bool  # the type of 16-bit scales; else fp16
    locks: torch.Tensor  # int32 counters, 0 between launches
    outliers: Outliers | None = None


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
    outliers: Outliers | None = None,
) -> Weight:  # fmt: skip
    """Repack words (O, K) int32, scale (O, G), zero (O, G) uint8 or None, on their device and in pieces."""
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
    locks = torch.zeros(2 * tiles * _BLOCKS_OF_X, dtype=torch.int32, device=words.device)
    half = scale.dtype == torch.bfloat16
    return Weight(shape, bits, group, torch.cat(pieces), _by_group(stats, tiles, groups), wide, half, locks, outliers)


def linear(x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    if torch.compiler.is_compiling():
        s = w.outliers
        parts = (None,) * 5 if s is None else s[:5]
        flags = w.bf16, s is not None and s.bf16
        return _op(x, w.words, w.stats, w.scale, bias, w.locks, *parts, w.shape[0], w.bits, w.group, *flags)
    return _product(x, w, bias)


def _product(x: torch.Tensor, w: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    O, I = w.shape
    flat = x.reshape(-1, I)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    y = flat.new_empty(len(flat), O)
    if flat.shape[0] and O:
        how = gpu_table.choose(w.bits, w.group, w.shape, len(flat), flat.device)
        if flat.is_cuda and flat.device.index != torch.cuda.current_device():
            with torch.cuda.device(flat.device):
                run(flat, w, bias, y, how)
        else:
            run(flat, w, bias, y, how)
    return y.view(*x.shape[:-1], O)


def run(x: torch.Tensor, w: Weight, bias: torch.Tensor | None, y: torch.Tensor, how: gpu_table.Choice) -> None:
    """Write x (M, I) Wᵀ + bias to y (M, O), as `how` says. M > 0, and x's columns lie together."""
    if how.path == "scratch":
        _through_scratch(x, w, bias, y, how)
    else:
        _fused(x, w, bias, y, how)


def _decoder(dtype: torch.dtype) -> int:
    """DECODE of device.py: assembly; in the interpreter, or for fp32, plain Triton."""
    if dtype == torch.float32 or (interpreted() and dtype == torch.bfloat16):
        return 2
    return 1 if interpreted() else 0


def _fused(x: torch.Tensor, w: Weight, bias: torch.Tensor | None, y: torch.Tensor, how: gpu_table.Choice) -> None:
    code: Any = device_code()
    (M, K), N = x.shape, w.shape[0]
    NP, KT = w.stats.shape[1], w.words.shape[1]
    blocks = -(-M // how.BM)
    split = min(how.split, KT) if blocks <= _BLOCKS_OF_X else 1
    grid = (NP // how.BN, blocks, split)
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
        M, N, NP, K, KT, x.stride(0), y.stride(0), xt.stride(0),
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
        w.stats.shape[1], w.shape[1], KT,
        BITS=w.bits, GROUP=w.group, WIDE=w.scale is not None, BF16_SCALES=w.bf16, DECODE=_decoder(out.dtype), num_warps=4,
    )  # fmt: skip
    if w.outliers is not None:
        code.put[(tiles,)](*w.outliers[:5], out, first, w.shape[1], BF16_VALUES=w.outliers.bf16, num_warps=4)
    return out


def _through_scratch(x: torch.Tensor, w: Weight, bias: torch.Tensor | None, y: torch.Tensor, how: gpu_table.Choice) -> None:
    O, I = w.shape
    rows = max(1, how.slab // (x.element_size() * I * TILE)) * TILE if how.slab else O
    scratch = x.new_empty(min(rows, O), I)
    for start in range(0, O, rows):
        stop = min(start + rows, O)
        W = dequantize(w, start // TILE, scratch[: stop - start])
        out = y[:, start:stop]
        if bias is None:
            torch.mm(x, W.T, out=out)
        else:
            torch.addmm(bias[start:stop], x, W.T, out=out)


def fuse(weights: Sequence[Weight]) -> tuple[Weight, list[Weight]]:
    """Weights that read the same x (q, k, v; gate, up) as one, and each again with its words a view of it.

    The product with the first has each weight's outputs from a multiple of 128 on: `split` takes them apart. Raises ValueError
    where the weights differ in inputs, bits, group, types of scales and values, or in having outliers.
    """
    head = weights[0]
    kinds = {(w.shape[1], w.bits, w.group, w.scale is None, w.bf16, w.outliers and w.outliers.bf16) for w in weights}
    if len(kinds) != 1:
        raise ValueError(f"weights that differ cannot be one: {sorted(map(str, kinds))}")
    words, stats = torch.cat([w.words for w in weights]), torch.cat([w.stats for w in weights], 1)
    scale = None if head.scale is None else torch.cat([w.scale for w in weights if w.scale is not None], 1)
    all_of_them = [w.outliers for w in weights if w.outliers is not None]
    outliers = _joined(all_of_them) if all_of_them else None
    locks = torch.zeros(2 * len(words) * _BLOCKS_OF_X, dtype=torch.int32, device=words.device)
    shape = stats.shape[1], head.shape[1]
    whole = Weight(shape, head.bits, head.group, words, stats, scale, head.bf16, locks, outliers)
    members, tile = [], 0
    for w in weights:
        members.append(replace(w, words=words[tile : tile + len(w.words)]))
        tile += len(w.words)
    return whole, members


def joined_bias(biases: Sequence[torch.Tensor | None], weights: Sequence[Weight]) -> torch.Tensor | None:
    """Biases (O_i,) of fused weights as the fused product's; None where there is none."""
    some = next((b for b in biases if b is not None), None)
    if some is None:
        return None
    whole = some.new_zeros(sum(w.stats.shape[1] for w in weights))
    for b, part in zip(biases, split(whole, weights), strict=True):
        if b is not None:
            part.copy_(b)
    return whole


def _joined(parts: Sequence[Outliers]) -> Outliers:
    """Outliers of weights whose tiles follow each other."""
    starts, run_starts, chunks, runs = [], [], 0, 0
    for p in parts:
        starts.append(p.starts[:-1] + chunks)
        run_starts.append(p.run_starts[:-1] + runs)
        chunks, runs = chunks + len(p.entries), runs + len(p.runs)
    starts.append(parts[0].starts.new_full((1,), chunks))
    run_starts.append(parts[0].starts.new_full((1,), runs))
    entries, run_rows, words = (torch.cat([p[i] for p in parts]) for i in (1, 3, 4))  # type: ignore[misc]
    return Outliers(torch.cat(starts), entries, torch.cat(run_starts), run_rows, words, parts[0].bf16)


def split(y: torch.Tensor, weights: Sequence[Weight]) -> list[torch.Tensor]:
    """Outputs (..., O_i) of each weight, views of the fused product's y."""
    out, first = [], 0
    for w in weights:
        out.append(y[..., first : first + w.shape[0]])
        first += w.stats.shape[1]
    return out


@torch.library.custom_op("compress_kernels::int_grouped_triton", mutates_args=())
def _op(
    x: torch.Tensor, words: torch.Tensor, stats: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None,
    locks: torch.Tensor, starts: torch.Tensor | None, entries: torch.Tensor | None, run_starts: torch.Tensor | None,
    run_rows: torch.Tensor | None, runs: torch.Tensor | None, outputs: int, bits: int, group: int, bf16_scales: bool,
    bf16_values: bool,
) -> torch.Tensor:  # fmt: skip
    s = None
    if starts is not None and entries is not None and run_starts is not None and run_rows is not None and runs is not None:
        s = Outliers(starts, entries, run_starts, run_rows, runs, bf16_values)
    return _product(x, Weight((outputs, x.shape[-1]), bits, group, words, stats, scale, bf16_scales, locks, s), bias)


@_op.register_fake
def _(
    x: torch.Tensor, words: torch.Tensor, stats: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None,
    locks: torch.Tensor, starts: torch.Tensor | None, entries: torch.Tensor | None, run_starts: torch.Tensor | None,
    run_rows: torch.Tensor | None, runs: torch.Tensor | None, outputs: int, bits: int, group: int, bf16_scales: bool,
    bf16_values: bool,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], outputs)

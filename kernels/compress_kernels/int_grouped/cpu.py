"""Our own CPU kernel for 2, 3, 4 and 8 bits (`cpu.cpp`): a repacked weight, and one call per product.

Two modes. `int8` quantizes the activations, symmetric and at most 32 columns to a scale, and multiplies integers: about 0.5 % of
the output's norm away from the reference on normal numbers. `exact` keeps them in fp32: the reference up to the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from compress_kernels import bits as bitpack
from compress_kernels import native
from compress_kernels.native import pages

CHUNK = {2: 16, 3: 32, 4: 16, 8: 8}  # columns that are unpacked together
TILE = 16  # output rows that lie together
MOST = 32  # columns of an activation's scale; 128 would be 10 % faster and twice as far off (docs/log.md)
ROWS_EXACT = 256  # from more rows of x on, `exact` is slower than decoding tiles for the BLAS
FEW = 4  # rows of a tile that share a step of outliers
_ROWS = 1024  # rows repacked at a time


@dataclass(frozen=True)
class Weight:
    """A weight (O, I) in the kernel's layout."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    exact: bool
    codes: torch.Tensor  # uint8, see cpu.cpp
    scale: torch.Tensor  # (tiles, G, 16)
    zero: torch.Tensor | None  # (tiles, G, 16) uint8; None where symmetric
    outliers: tuple[torch.Tensor, ...] | None  # indptr, index, value, step, step_index, step_value of native/jobs.h
    job: Any = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has tensors, and so pointers, of its own."""
        return make, (self.codes, self.scale, self.zero, self.outliers, self.shape, self.bits, self.exact)


def can_run(bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason why this path cannot serve a weight of `shape` (O, I) and activations of `dtype`."""
    if device.type != "cpu":
        return f"the weight is on {device.type}, cpu is a CPU kernel"
    why = native.missing()
    if why is not None:
        return f"the C++ library cannot be used: {why}"
    if dtype not in native.TYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, cpu has float32, bfloat16 and float16"
    if bits not in CHUNK:
        return f"{bits} bits, cpu has 2, 3, 4 and 8"
    if group_size % CHUNK[width(bits, group_size)]:
        return f"groups of {group_size}, cpu needs multiples of {8 if bits == 8 else 16}"
    return None


def width(bits: int, group_size: int) -> int:
    """Bits that a code takes in the kernel: groups that 32 does not divide have their codes of 3 bits in 4."""
    return 4 if bits == 3 and group_size % CHUNK[3] else bits


def sub_group(group_size: int, bits: int) -> int:
    """Columns of an activation's scale: the largest divisor of a group, multiple of the chunk, that is at most 32."""
    return max(s for s in range(CHUNK[bits], min(group_size, MOST) + 1, CHUNK[bits]) if group_size % s == 0)


def _tiled(t: torch.Tensor, tiles: int) -> torch.Tensor:
    """(O, G) as (tiles, G, 16), rows beyond the last one 0."""
    padded = torch.nn.functional.pad(t, (0, 0, 0, tiles * TILE - len(t)))
    return padded.view(tiles, TILE, -1).transpose(1, 2).contiguous()


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (16 t, I) uint8 as the kernel's units, flat uint8."""
    chunk = CHUNK[bits]
    quads = q.view(-1, TILE, q.shape[1] // chunk, chunk // 4, 4).permute(3, 0, 2, 1, 4)  # (quads, tiles, chunks, 16, 4)
    if bits == 8:
        units = [quads[0], quads[1]]
    elif bits == 4:
        units = [quads[0] | quads[1] << 4, quads[2] | quads[3] << 4]
    else:
        low = [quads[i] & 3 for i in range(len(quads))]
        units = [low[i] | low[i + 1] << 2 | low[i + 2] << 4 | low[i + 3] << 6 for i in range(0, len(low), 4)]
        if bits == 3:
            top = quads[0] >> 2
            for i in range(1, 8):
                top = top | (quads[i] >> 2) << i
            units.append(top)
    return torch.stack(units, 2).reshape(-1)  # (tiles, chunks, units, 16, 4)


def prepare(
    words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, shape: tuple[int, int], bits: int, exact: bool,
    outliers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> Weight:  # fmt: skip
    """Repack words (O, K), scale (O, G), zero (O, G) uint8 or None; outliers are CSR parts as the artifact has them."""
    O, I = shape
    own, tiles = width(bits, I // scale.shape[1]), -(-O // TILE)
    codes, done = pages.empty(tiles * TILE * I * own // 8), 0
    for part in words.split(_ROWS):
        q = bitpack.unpack(part, bits, I)
        piece = pack(torch.nn.functional.pad(q, (0, 0, 0, -len(q) % TILE)), own)
        codes[done : done + len(piece)] = piece
        done += len(piece)
    if zero is None and own != bits:
        zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    if scale.dtype not in native.TYPES:
        scale = scale.float()
    csr = None if outliers is None else steps(*outliers, shape)
    return make(
        codes, _tiled(scale, tiles), None if zero is None else _tiled(zero, tiles), csr, shape, own, exact
    )  # fmt: skip


def steps(indptr: torch.Tensor, index: torch.Tensor, value: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """CSR outliers of a weight (O, I) in steps of one for each of a tile's rows, and what is left of rows with many more, in CSR.

    Steps end with the longest row; or, where that is much longer than the others, when fewer than FEW rows have a next outlier.
    """
    O, I = shape
    tiles, bounds = -(-O // TILE), indptr.to(torch.int64)
    counts = torch.nn.functional.pad(bounds.diff(), (0, -O % TILE))
    row = torch.arange(O).repeat_interleave(bounds.diff())
    place = torch.arange(len(row)) - bounds[row]  # in its row
    longest = counts.view(tiles, TILE).sort(1, descending=True).values
    many = longest[:, 0].where(longest[:, 0] * TILE <= 2 * longest.sum(1) + 8 * TILE, longest[:, FEW - 1])  # steps of each tile
    start = torch.nn.functional.pad(many.cumsum(0), (1, 0))
    early = place < many[row // TILE]
    at = ((start[row // TILE] + place) * TILE + row % TILE)[early]
    columns = torch.zeros(int(start[-1]) * TILE, dtype=torch.int32)
    values = torch.zeros(len(columns), dtype=value.dtype)
    index = index.to(torch.int32) & 0xFFFF if index.dtype == torch.int16 else index.to(torch.int32)
    columns[at], values[at] = index[early], value[early]
    left = torch.nn.functional.pad((~early).to(torch.int64).cumsum(0), (1, 0))[bounds]
    short = columns.to(torch.int16) if I <= 1 << 16 else columns
    return left, index[~early].contiguous(), value[~early].contiguous(), start, short, values


def make(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, outliers: tuple[torch.Tensor, ...] | None,
    shape: tuple[int, int], bits: int, exact: bool,
) -> Weight:  # fmt: skip
    """A weight from tensors in the kernel's layout."""
    O, I = shape
    group = I // scale.shape[1]
    parts = [None] * 6 if outliers is None else [t.data_ptr() for t in outliers]
    job = native.IntGrouped(
        I, O, group, sub_group(group, bits), bits, native.TYPES[scale.dtype], int(exact),
        0 if outliers is None else native.TYPES[outliers[2].dtype], codes.data_ptr(), scale.data_ptr(), native.pointer(zero),
        *parts, 0 if outliers is None else int(outliers[4].dtype == torch.int16),
    )  # fmt: skip
    return Weight(shape, bits, group, exact, codes, scale, zero, outliers, job)


def linear(x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    if torch.compiler.is_compiling():
        y = _op(x, w.codes, w.scale, w.zero, list(w.outliers or ()), w.shape[0], w.bits, w.exact)
    else:
        y = _product(x, w)
    return y if bias is None else y + bias


def _product(x: torch.Tensor, w: Weight) -> torch.Tensor:
    job = w.job
    outliers = w.outliers is not None
    return native.product("cc_int_grouped", job, x, w.shape[1], w.shape[0], lambda M: workspace(job, M, outliers))


def workspace(job: Any, M: int, outliers: bool = False) -> int:
    """Bytes that the library needs for M rows of x; more where outliers' columns of x shall lie side by side."""
    size = M * (4 * (job.K // job.group + job.K) if job.exact else 8 * (job.K // job.sub) + job.K)
    return int(size + 64 + 4 * job.K * (-(-M // 16) * 16 if M > 1 else 1) if outliers else size)


@torch.library.custom_op("compress_kernels::int_grouped_cpu", mutates_args=())
def _op(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, outliers: list[torch.Tensor],
    outputs: int, bits: int, exact: bool,
) -> torch.Tensor:  # fmt: skip
    parts = tuple(outliers) or None
    return _product(x, make(codes, scale, zero, parts, (outputs, x.shape[-1]), bits, exact))


@_op.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, outliers: list[torch.Tensor],
    outputs: int, bits: int, exact: bool,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], outputs)

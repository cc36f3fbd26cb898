"""Our own CPU kernel for masked weights (bitmask/cpu.cpp): kinds `bitmask`, `sparse24` of any N:M, and `sparse24_int`.

All three become a mask of single bits and the kept values, or codes, row after row: 2:4's positions take as many bits as its mask.
The library multiplies any number of rows of bf16 where the machine has AVX-512 BF16, and few rows elsewhere; many are multiplied by
the BLAS, with dense tiles that the library expands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from compress_kernels import bits as bitpack
from compress_kernels import native

PANEL, PANELS = 16, 18  # rows of x in a panel, and panels that are multiplied together (native/panels.h)
ROWS_OF_X = 96  # from more rows on, expanding tiles for the BLAS is faster where there are no panels,
NEAR = ROWS_OF_X << 12  # and from more numbers of x on, which fill the cache
TILE = 1 << 20  # weights that are expanded together,
LEAST = 256  # and rows of them at least: the BLAS is slow with fewer
STEP = 32  # columns that a row of the mask is filled up to, and values beyond the last


@dataclass(frozen=True)
class Weight:
    """A weight (O, I) in the kernel's layout."""

    shape: tuple[int, int]
    group_size: int  # 0: floats
    mask: torch.Tensor  # (O, 4 ceil(I/32)) uint8
    start: torch.Tensor  # (O+1,) int64
    values: torch.Tensor  # (nnz + 32,) floats, or (O I/4 + 32,) uint8, two codes in each
    scale: torch.Tensor | None  # (O, G), of codes
    zero: torch.Tensor | None  # (O, G) uint8
    job: Any = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has tensors, and so pointers, of its own."""
        return make, (self.mask, self.start, self.values, self.scale, self.zero, self.shape, self.group_size)


def can_run(dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or the reason why the library cannot serve a masked weight and activations of `dtype`."""
    if device.type != "cpu":
        return f"the weight is on {device.type}, cpu is a CPU kernel"
    if dtype not in native.TYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, cpu has float32, bfloat16 and float16"
    why = native.missing()
    return None if why is None else f"the C++ library cannot be used: {why}"


def can_run_codes(bits: int, n: int, m: int, group_size: int) -> str | None:
    """None, or the reason why codes of `bits` bits, n of m kept, cannot be served."""
    if bits != 4 or 2 * n != m or 16 % m or group_size % 16:
        return f"{bits} bits, {n}:{m} and groups of {group_size}; cpu has 4 bits, half kept of 2, 4, 8 or 16, and groups of 16 k"
    return None


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values as bf16 where activations are: the reference rounds them so too, and the kernel multiplies pairs of bf16."""
    return values.to(dtype) if dtype == torch.bfloat16 else values


def _bits(kept: torch.Tensor) -> torch.Tensor:
    """Mask (O, I) uint8 of 0 and 1 as bytes (O, 4 ceil(I/32))."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % STEP))
    return bitpack.pack(padded, 1).view(torch.uint8)[:, : padded.shape[1] // 8].contiguous()


def prepare(kept: torch.Tensor, values: torch.Tensor) -> Weight:
    """A weight from kept (O, I) uint8 of 0 and 1 and its values (nnz,), row after row."""
    start = torch.nn.functional.pad(kept.sum(1, dtype=torch.int64).cumsum(0), (1, 0))
    return make(_bits(kept), start, torch.nn.functional.pad(values, (0, STEP)), None, None, (kept.shape[0], kept.shape[1]), 0)


def prepare_codes(kept: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> Weight:
    """A weight from kept (O, I), codes q (O, I/2) uint8 of the kept columns, scale (O, G) and zero (O, G) uint8 or None."""
    O, I = kept.shape
    codes = torch.nn.functional.pad((q[:, ::2] | q[:, 1::2] << 4).view(-1), (0, STEP))
    start = torch.zeros(0, dtype=torch.int64)
    return make(_bits(kept), start, codes, scale.contiguous(), zero, (O, I), I // scale.shape[1])


def make(
    mask: torch.Tensor, start: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None,
    shape: tuple[int, int], group_size: int,
) -> Weight:  # fmt: skip
    """A weight from tensors in the kernel's layout."""
    O, I = shape
    floats = values if scale is None else scale
    job = native.Masked(
        I, O, group_size, native.TYPES[floats.dtype], 0, mask.data_ptr(), start.data_ptr(), values.data_ptr(),
        native.pointer(scale), native.pointer(zero),
    )  # fmt: skip
    return Weight(shape, group_size, mask, start, values, scale, zero, job)


def linear(x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype."""
    if torch.compiler.is_compiling():
        y = _op(x, w.mask, w.start, w.values, w.scale, w.zero, w.shape[0], w.group_size)
    else:
        y = _product(x, w)
    return y if bias is None else y + bias


def in_panels(x: torch.Tensor, w: Weight) -> bool:
    """Whether many rows of x are multiplied in panels: bf16 on a machine with AVX-512 BF16."""
    fits = w.values.dtype == torch.bfloat16 if w.scale is None else w.group_size % 32 == 0
    return x.dtype == torch.bfloat16 and fits and native.isa() == native.ISAS.index("avx512-bf16")


def few(x: torch.Tensor) -> bool:
    """Whether the library is faster than expanded tiles for the BLAS, also without panels."""
    return x.numel() <= min(ROWS_OF_X * x.shape[-1], NEAR)


def serves(x: torch.Tensor, w: Weight) -> bool:
    """Whether the library multiplies x (..., I) itself."""
    return few(x) or in_panels(x, w)


def panel_bytes(M: int, K: int) -> int:
    """Bytes of the panels of M rows of K columns that lie in memory together."""
    return 2 * min(-(-M // PANEL), PANELS) * (-(-K // STEP) * STEP * PANEL + STEP)


def workspace(M: int, K: int, panels: bool) -> int:
    """Bytes that the library needs for M rows of x."""
    rows = 4 * M * (-(-K // 16) * 16)
    return max(panel_bytes(M, K), 0 if M > PANEL else rows) if panels else rows


def _product(x: torch.Tensor, w: Weight) -> torch.Tensor:
    O, I = w.shape
    if serves(x, w):
        panels = in_panels(x, w)
        return native.product("cc_masked", w.job, x, I, O, lambda M: workspace(M, I, panels))
    flat = x.reshape(-1, I)
    rows = min(O, max(LEAST, TILE // I))
    scratch, out = x.new_empty(rows, I), x.new_empty(len(flat), O)
    for first in range(0, O, rows):
        W = scratch[: min(rows, O - first)]
        native.masked_rows(w.job, first, W)
        out[:, first : first + len(W)] = torch.nn.functional.linear(flat, W)
    return out.view(*x.shape[:-1], O)


@torch.library.custom_op("compress_kernels::masked_cpu", mutates_args=())
def _op(
    x: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None,
    zero: torch.Tensor | None, outputs: int, group_size: int,
) -> torch.Tensor:  # fmt: skip
    return _product(x, make(mask, start, values, scale, zero, (outputs, x.shape[-1]), group_size))


@_op.register_fake
def _(
    x: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None,
    zero: torch.Tensor | None, outputs: int, group_size: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], outputs)

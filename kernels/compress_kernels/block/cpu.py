"""`reference.step` by one call of the C++ library (`cpu.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from compress_kernels import native
from compress_kernels.armor import cpu as armor
from compress_kernels.block.reference import Block, Linear, Shape
from compress_kernels.int_grouped import cpu as int_grouped
from compress_kernels.lowrank_sparse import cpu as factors
from compress_kernels.masked_delta import single
from compress_kernels.native import decoder, masked

ROWS = 16  # of a batch; more are faster by the BLAS
LARGEST_HEAD = 512
_KINDS: dict[type, int] = {
    int_grouped.Weight: decoder.INTS, masked.Weight: decoder.MASKED, factors.Weight: decoder.FACTORS, armor.Weight: decoder.ARMOR,
    single.Weight: decoder.DELTA,
}  # fmt: skip
_SMALL = 1 << 20  # weights of a block, below which it runs on one thread


def can_run(blocks: Sequence[Block], norm: torch.Tensor, head: Linear, shape: Shape, dtype: torch.dtype) -> str | None:
    """None, or the reason why the library cannot run these weights with a cache of `dtype`."""
    why = native.missing()
    if why is not None:
        return f"the C++ library cannot be used: {why}"
    if shape.head_dim % 16 or shape.head_dim > LARGEST_HEAD:
        return f"heads of {shape.head_dim}, cpu has multiples of 16 up to {LARGEST_HEAD}"
    if dtype not in native.TYPES:
        return f"activations are {str(dtype).removeprefix('torch.')}, cpu has float32, bfloat16 and float16"
    norms = [norm, *(t for b in blocks for t in (b.norm_in, b.norm_mid, b.norm_q, b.norm_k) if t is not None)]
    dense = [l.weight for b in blocks for l in b.linears if isinstance(l.weight, torch.Tensor)]
    dense += [head.weight] if isinstance(head.weight, torch.Tensor) else []
    biases = [l.bias for l in (*(l for b in blocks for l in b.linears), head) if l.bias is not None]
    for tensor in (*norms, *dense, *biases):
        if tensor.device.type != "cpu" or tensor.dtype not in native.TYPES or not tensor.is_contiguous():
            return f"a weight is {tensor.dtype} on {tensor.device}, cpu has contiguous floats on the CPU"
    if len({t.dtype for t in norms}) > 1:
        return "the norms' weights differ in dtype"
    return None


class Decoder:
    """A model's blocks and head, ready to run; holds the weights that it points to."""

    def __init__(self, blocks: Sequence[Block], norm: torch.Tensor, head: Linear, shape: Shape, dtype: torch.dtype) -> None:
        """`can_run` has said None of the same arguments. Weights that do not fit together raise a RuntimeError."""
        self.dtype, self.shape, self.outputs = dtype, shape, head.shape[0]
        self._kept: list[Any] = [list(blocks), norm, head]
        inner, D = blocks[0].gate.shape if blocks else (1, len(norm))
        table = (decoder.Block * len(blocks))(*(self._block(b) for b in blocks))
        self._kept.append(table)
        self._job = decoder.Decoder(
            len(blocks), D, inner, shape.heads, shape.kv_heads, shape.head_dim, shape.eps, shape.scale, native.TYPES[norm.dtype],
            native.TYPES[dtype], ctypes.addressof(table), norm.data_ptr(), self._linear(head),
        )  # fmt: skip
        self._library = decoder.library()
        self._small = sum(l.shape[0] * l.shape[1] for b in blocks[:1] for l in b.linears) < _SMALL
        self._room: tuple[tuple[int, int, int, int], torch.Tensor] | None = None
        native.check("cc_decode", self._library.cc_decode(native.isa(), self._job, decoder.Step()))

    def _block(self, b: Block) -> decoder.Block:
        norms = [native.pointer(t) for t in (b.norm_in, b.norm_mid, b.norm_q, b.norm_k)]
        return decoder.Block(*norms, *(self._linear(l) for l in b.linears))

    def _linear(self, l: Linear) -> decoder.Linear:
        O, I = l.shape
        bias = 0 if l.bias is None else native.TYPES[l.bias.dtype]
        if isinstance(l.weight, torch.Tensor):
            kind, type_, weight = decoder.DENSE, native.TYPES[l.weight.dtype], l.weight.data_ptr()
        else:
            kind = _KINDS[type(l.weight)]
            type_, weight = native.TYPES[l.dtype], ctypes.addressof(l.weight.job)
        return decoder.Linear(I, O, kind, type_, bias, 0, weight, native.pointer(l.bias))

    def step(self, x: torch.Tensor, cache: Any, capacity: int, slot: int, first: torch.Tensor, cos: int, sin: int) -> torch.Tensor:
        """`reference.step` for x (B, D) -> logits (B, V) fp32.

        `cache` is `pointers` of the blocks' caches, which have `capacity` places; cos and sin are the addresses of fp32
        (B, head_dim/2), first is (B,) int64.
        """
        B = len(x)
        y = torch.empty(B, self.outputs)
        threads = 1 if self._small else torch.get_num_threads()
        job = decoder.Step(
            B, slot, capacity, native.TYPES[x.dtype], threads, x.data_ptr(), ctypes.addressof(cache), first.data_ptr(), cos, sin,
            y.data_ptr(),
        )  # fmt: skip
        isa = native.isa()
        key = B, capacity, threads, isa
        if self._room is None or self._room[0] != key:
            size = self._library.cc_decode_bytes(isa, self._job, job)
            self._room = key, torch.empty(size + 64, dtype=torch.uint8)
        room = self._room[1]
        job.workspace = -(-room.data_ptr() // 64) * 64
        job.workspace_bytes = len(room) - 64
        native.check("cc_decode", self._library.cc_decode(isa, self._job, job))
        return y


def pointers(cache: Sequence[torch.Tensor]) -> Any:
    """The addresses of the blocks' caches (2, B, H_kv, capacity, head_dim), which must stay alive."""
    return (ctypes.c_void_p * len(cache))(*(t.data_ptr() for t in cache))


__all__ = ["LARGEST_HEAD", "ROWS", "Decoder", "can_run", "masked", "pointers"]

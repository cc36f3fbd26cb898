"""ARMOR's weights (arXiv 2510.05528): a sparse core between two block diagonals, W = A S B. Our own loader only.

Layout for W (O, I), params n, m, b_in and b_out; E is F16 or BF16, the checkpoint's dtype (F16 for F32):

    values, meta   the core S as `sparse24`, or, where the param `core` is "sparse24_int", that kind's tensors and params,
                   with scales of E
    pre            E (I//b_in, b_in, b_in)       B = blockdiag(pre), the scales of the inputs folded in
    post           E (O//b_out, b_out, b_out)    A = blockdiag(post), the scales of the outputs folded in
    pre_rest       E (I%b_in, I%b_in)            B's last block, where b_in does not divide I
    post_rest      E (O%b_out, O%b_out)          A's last block, where b_out does not divide O

x goes through the blocks of pre, then S, then the blocks of post. In memory the blocks are a stack, a smaller last one in the
corner of an identity (`reference.stack`), on vectors padded with zeros; no padding is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from compress_kernels.armor import reference

from compress.errors import CompressError
from compress.formats import int_grouped, int_grouped_outliers, sparse24, sparse24_int
from compress.types import Packed, TensorSpec, Trainable, Wrappers

KIND = "armor"
VERSION = 1

wrap = reference.wrap  # A S B (O, I) of a core (O, I), pre and post as stacks; differentiable
STEPS = {"S": 0.3, "pre": 0.1, "post": 0.1}  # of the usual one, in recovery
WRAPPERS = ("pre", "pre_rest", "post", "post_rest")
value_dtype = int_grouped_outliers.value_dtype
bits_per_weight = int_grouped.bits_per_weight


def _core(params: Mapping[str, Any], shape: tuple[int, int]) -> ModuleType:
    """The core's format; params that do not fit a linear of `shape` (O, I) raise."""
    why = reference.unfit(params, shape)
    if why is not None:
        raise CompressError(why, hint="use another block size, or --ignore this linear", usage=True)
    return {core.KIND: core for core in (sparse24, sparse24_int)}[reference.core_kind(params)]


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """Suffix -> (safetensors dtype, shape) of a linear of `shape` (O, I) of a checkpoint of safetensors dtype `dtype`."""
    E = value_dtype(dtype)
    out: dict[str, TensorSpec] = dict(_core(params, shape).spec(params, shape, E))
    return out | {name: (E, size) for name, size in reference.block_shapes(params, shape).items()}


def pack(core: Packed, pre: torch.Tensor, post: torch.Tensor) -> Packed:
    """Pack a core of kind `sparse24` or `sparse24_int`, pre (ceil(I/b), b, b) and post (ceil(O/b), b, b), all of E.

    Of a last block that reaches beyond I or O only the corner is stored. fp32 in place of E only on the way to a dense export.
    """
    own = {} if core.kind == sparse24.KIND else {"core": core.kind}
    params = {**core.params, **own, "b_in": int(pre.shape[-1]), "b_out": int(post.shape[-1])}
    _core(params, core.shape)
    tensors = dict(core.tensors)
    for (name, D), size in zip((("pre", pre), ("post", post)), core.shape[::-1], strict=True):
        b = D.shape[-1]
        count, rest = divmod(size, b)
        assert D.shape == (count + bool(rest), b, b), f"{name}: square blocks, as many as are needed"
        tensors[name] = D[:count].contiguous()
        if rest:
            tensors[f"{name}_rest"] = D[count, :rest, :rest].contiguous()
    floats = {t.dtype for t in tensors.values() if t.is_floating_point()}
    assert floats in ({torch.float16}, {torch.bfloat16}, {torch.float32}), "values, scales and blocks have one dtype"
    return Packed(KIND, VERSION, params, tensors, core.shape)


def wrappers(tensors: Mapping[str, torch.Tensor]) -> Wrappers:
    """pre and post as stacks."""
    return reference.stack(tensors, "pre"), reference.stack(tensors, "post")


def unpack(packed: Packed) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    """The core, and pre and post as stacks: exactly what was packed."""
    core = _core(packed.params, packed.shape)
    params = {key: value for key, value in packed.params.items() if key not in ("core", "b_in", "b_out")}
    tensors = {name: t for name, t in packed.tensors.items() if name not in WRAPPERS}
    return Packed(core.KIND, core.VERSION, params, tensors, packed.shape), *wrappers(packed.tensors)


def dequantize(packed: Packed) -> torch.Tensor:
    """The dense weight (O, I), A S B multiplied in fp32."""
    return reference.dequantize(packed.tensors, packed.params, packed.shape)


def from_int_grouped(packed: Packed, params: Mapping[str, Any], pre: torch.Tensor, post: torch.Tensor) -> Packed:
    """A quantized core, as `int_grouped`, between wrappers as they were."""
    return pack(sparse24_int.from_int_grouped(packed, params), pre, post)


def to_int_grouped(packed: Packed) -> Packed:
    """The core of such a weight again."""
    return sparse24_int.to_int_grouped(unpack(packed)[0])


def pruned(packed: Packed) -> torch.Tensor:
    """The core (O, I) in fp32, whose zeros are meant."""
    core = unpack(packed)[0]
    W: torch.Tensor = _core(packed.params, packed.shape).dequantize(core)
    return W


def trainable(packed: Packed) -> Trainable:
    """The core's kept values and both wrappers may change, by 0.3 and 0.1 of the usual step; the mask may not.

    A step moves every entry of a factor by its share at once, and a weight of A S B sums over the entries of a block: at the
    usual step the product moves so far that training loses the solution which it starts from (docs/log.md).
    """
    core, pre, post = unpack(packed)
    _, mask = sparse24.unpack(core)
    n, m, dtype = int(core.params["n"]), int(core.params["m"]), pre.dtype

    def weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return wrap(parts["S"] * mask.to(parts["S"].device), parts["pre"], parts["post"])

    def rebuild(parts: Mapping[str, torch.Tensor]) -> Packed:
        values = sparse24.pack((parts["S"].cpu() * mask).to(dtype), mask, n=n, m=m)
        return pack(values, parts["pre"].cpu().to(dtype), parts["post"].cpu().to(dtype))

    parts = {"S": sparse24.dequantize(core), "pre": pre.float(), "post": post.float()}
    return Trainable(parts, weight, rebuild, STEPS)


def problems(packed: Packed) -> list[str]:
    """What is wrong with the tensors; empty where they can be used. `unpack` and `dequantize` do not look."""
    return reference.problems(packed.tensors, packed.params, packed.shape)

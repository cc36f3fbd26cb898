"""ARMOR's weights (arXiv 2510.05528): a sparse core between two block diagonals, W = A S B. Our own loader only.

Layout for W (O, I), params n, m, b_in and b_out; E is F16 or BF16, the checkpoint's dtype (F16 for F32):

    values, meta   the core S as `sparse24`, or, where the param `core` is "sparse24_int", that kind's tensors and params,
                   with scales of E
    pre            E (I/b_in, b_in, b_in)       B = blockdiag(pre), the scales of the inputs folded in
    post           E (O/b_out, b_out, b_out)    A = blockdiag(post), the scales of the outputs folded in

x goes through the blocks of pre, then S, then the blocks of post. b_in divides I, b_out divides O.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from compress_kernels.armor import reference

from compress.errors import CompressError
from compress.formats import int_grouped, int_grouped_outliers, sparse24, sparse24_int
from compress.types import Packed, TensorSpec, Trainable

KIND = "armor"
VERSION = 1

wrap = reference.wrap  # A S B (O, I) of a core (O, I), pre and post; differentiable
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
    E, b_in, b_out = value_dtype(dtype), int(params["b_in"]), int(params["b_out"])
    out: dict[str, TensorSpec] = dict(_core(params, shape).spec(params, shape, E))
    return out | {"pre": (E, (shape[1] // b_in, b_in, b_in)), "post": (E, (shape[0] // b_out, b_out, b_out))}


def pack(core: Packed, pre: torch.Tensor, post: torch.Tensor) -> Packed:
    """Pack a core of kind `sparse24` or `sparse24_int`, pre (I/b_in, b_in, b_in) and post (O/b_out, b_out, b_out), all of E."""
    O, I = core.shape
    own = {} if core.kind == sparse24.KIND else {"core": core.kind}
    params = {**core.params, **own, "b_in": int(pre.shape[-1]), "b_out": int(post.shape[-1])}
    _core(params, core.shape)
    assert pre.shape == (I // params["b_in"], *pre.shape[-1:] * 2), "square blocks, as many as the inputs need"
    assert post.shape == (O // params["b_out"], *post.shape[-1:] * 2), "square blocks, as many as the outputs need"
    floats = {t.dtype for t in (pre, post, *core.tensors.values()) if t.is_floating_point()}
    assert floats in ({torch.float16}, {torch.bfloat16}), "values, scales and blocks have one 16-bit dtype"
    tensors = {**core.tensors, "pre": pre.contiguous(), "post": post.contiguous()}
    return Packed(KIND, VERSION, params, tensors, core.shape)


def unpack(packed: Packed) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    """The core, pre and post: exactly what was packed."""
    core = _core(packed.params, packed.shape)
    params = {key: value for key, value in packed.params.items() if key not in ("core", "b_in", "b_out")}
    tensors = {name: t for name, t in packed.tensors.items() if name not in ("pre", "post")}
    return Packed(core.KIND, core.VERSION, params, tensors, packed.shape), packed.tensors["pre"], packed.tensors["post"]


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
    """The core's kept values and both wrappers may change, the mask may not."""
    core, pre, post = unpack(packed)
    _, mask = sparse24.unpack(core)
    n, m, dtype = int(core.params["n"]), int(core.params["m"]), pre.dtype

    def weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return wrap(parts["S"] * mask.to(parts["S"].device), parts["pre"], parts["post"])

    def rebuild(parts: Mapping[str, torch.Tensor]) -> Packed:
        values = sparse24.pack((parts["S"].cpu() * mask).to(dtype), mask, n=n, m=m)
        return pack(values, parts["pre"].cpu().to(dtype), parts["post"].cpu().to(dtype))

    return Trainable({"S": sparse24.dequantize(core), "pre": pre.float(), "post": post.float()}, weight, rebuild)


def problems(packed: Packed) -> list[str]:
    """What is wrong with the tensors; empty where they can be used. `unpack` and `dequantize` do not look."""
    return reference.problems(packed.tensors, packed.params, packed.shape)

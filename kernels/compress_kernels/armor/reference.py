"""The definition of `armor`: y = A S B x + bias, where A = blockdiag(post), B = blockdiag(pre), and S is the sparse core.

Where a block size does not divide the outputs or the inputs, the last block is smaller and lies apart, as `post_rest` or
`pre_rest`. It is computed in the corner of a block of full size, an identity otherwise, on vectors padded with zeros.

The three products are taken one after the other, each in x's dtype: its factor is rounded to that dtype, and so are its
results and the sum with the bias. A path may differ in the order of summation only. The weight A S B is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compress_kernels import _sparse, sparse24, sparse24_int

CORES = {"sparse24": sparse24, "sparse24_int": sparse24_int}


def core_kind(params: Mapping[str, Any]) -> str:
    """Kind of the sparse core: `sparse24` where the params name none."""
    return str(params.get("core", "sparse24"))


def unfit(params: Mapping[str, Any], shape: tuple[int, int]) -> str | None:
    """None, or why the blocks of a weight of `shape` (O, I) cannot have these params."""
    if core_kind(params) not in CORES:
        return f"the core is {core_kind(params)!r}, not {' or '.join(CORES)}"
    for key, size, what in (("b_out", shape[0], "outputs"), ("b_in", shape[1], "inputs")):
        block = int(params[key])
        if not 1 <= block <= size:
            return f"{size} {what} cannot be split into blocks of {block}"
    return None


def block_problems(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> list[str]:
    """What is wrong with pre and post; empty where they can be used. The core is not looked at."""
    why = unfit(params, shape)
    if why:
        return [why]
    found = []
    for name, size in block_shapes(params, shape).items():
        found += _sparse.misshapen(name, tensors[name], size) or _sparse.not_finite(name, tensors[name])
    return found


def block_shapes(params: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of pre and post and, where a last block is smaller, of what lies beside them, of a weight of `shape` (O, I)."""
    out: dict[str, tuple[int, ...]] = {}
    for name, size, block in (("pre", shape[1], int(params["b_in"])), ("post", shape[0], int(params["b_out"]))):
        count, rest = divmod(size, block)
        out[name] = (count, block, block)
        if rest:
            out[f"{name}_rest"] = (rest, rest)
    return out


def stack(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """All blocks (k, b, b) of `name`, a smaller last one in the corner of an identity."""
    D, rest = tensors[name], tensors.get(f"{name}_rest")
    if rest is None:
        return D
    last = torch.eye(D.shape[1], dtype=D.dtype, device=D.device)
    last[: len(rest), : len(rest)] = rest
    return torch.cat([D, last.unsqueeze(0)])


def problems(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> list[str]:
    """What is wrong with the tensors of a weight of `shape` (O, I); empty where they can be used."""
    found = block_problems(tensors, params, shape)
    if core_kind(params) in CORES:
        found += CORES[core_kind(params)].reference.problems(tensors, params, shape)
    return found


def blocks(x: torch.Tensor, D: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) times blockdiag(D)ᵀ plus bias, D (k, b, b) of I or more columns, in x's dtype."""
    I, wide = x.shape[-1], D.shape[0] * D.shape[1]
    x = x if wide == I else torch.nn.functional.pad(x, (0, wide - I))
    columns = x.reshape(-1, D.shape[0], D.shape[1]).transpose(0, 1)
    y = torch.bmm(columns, D.to(x.dtype).transpose(1, 2)).transpose(0, 1).reshape(x.shape)[..., :I]
    return y if bias is None else y + bias


def dequantize(tensors: Mapping[str, torch.Tensor], params: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    """The weight A S B (O, I), multiplied in fp32."""
    S = CORES[core_kind(params)].reference.dequantize(tensors, params, shape)
    return wrap(S, stack(tensors, "pre").float(), stack(tensors, "post").float())


def wrap(S: torch.Tensor, pre: torch.Tensor, post: torch.Tensor) -> torch.Tensor:
    """A S B (O, I) of a core S (O, I) and stacks of blocks, in their dtype; differentiable."""
    O, wide = len(S), post.shape[0] * post.shape[1]
    padded = S if wide == O else torch.nn.functional.pad(S, (0, 0, 0, wide - O))
    left = torch.bmm(post, padded.unflatten(0, (len(post), -1))).view(padded.shape)[:O]
    return blocks(left, pre.transpose(1, 2))


def linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) through B, S and A, plus bias, in x's dtype."""
    y = CORES[core_kind(params)].reference.linear(blocks(x, stack(tensors, "pre")), tensors, params, shape)
    return blocks(y, stack(tensors, "post"), bias)

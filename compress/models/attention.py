"""Attention received by each token, computed head by head while a block runs.

    a_j = sum over heads and queries of A[head, query, j]

the AttnCon score of RSQ (arXiv 2503.01820; ylsung/rsq `attn_module.py`), which keeps a (heads, T, T) tensor instead. Works for
every family that calls transformers' attention interface; a mask of None means causal, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError

_NAME = "compress-received"
_QUERIES = 1024  # rows of the attention matrix at a time


class Received(Exception):
    """Carries the attention received (B, T), fp32, out of the block."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


def received(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """a (B, T) from query (B, H, T, d) and key (B, H_kv, T, d); mask is boolean (True: seen) or added to the logits."""
    B, H, T, _ = query.shape
    rep = H // key.shape[1]
    total = torch.zeros(B, key.shape[2], device=query.device)
    for head in range(H):
        k = key[:, head // rep].float().transpose(1, 2)
        for start in range(0, T, _QUERIES):
            q = query[:, head, start : start + _QUERIES].float()
            logits = (q @ k).mul_(scaling)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            if mask is None:
                rows = torch.arange(start, start + q.shape[1], device=q.device)
                logits.masked_fill_(torch.arange(k.shape[2], device=q.device) > rows[:, None], -torch.inf)
            else:
                part = mask[:, min(head, mask.shape[1] - 1), start : start + _QUERIES, : k.shape[2]]
                logits = logits.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else logits + part
            total += logits.softmax(-1).sum(1)
    return total


def _interface(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, softcap: float | None = None, **_: Any,
) -> Any:  # fmt: skip
    raise Received(received(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap))


def listen(block: nn.Module, call: Callable[[], Any]) -> torch.Tensor:
    """Run a call of the block up to its attention; what each token received (B, T)."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _interface)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    configs = {id(m.config): m.config for m in block.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        call()
    except Received as found:
        return found.value
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
    raise CompressError(
        "attention importance: this family does not use transformers' attention interface",
        hint="use another --importance, such as act-norm or none",
    )

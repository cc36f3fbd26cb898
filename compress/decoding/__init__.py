"""A compressed model's tokens, one native call each, behind the model's own `forward` and `generate`.

`attach(model)` wraps the model's forward. A call for one token of each row with an ordinary cache (what `generate` does after the
prompt) runs through `compress_kernels.block`; every other call, and every model that the kernel has not, runs as transformers does.
Logits of native steps are fp32. The prompt fills the same cache (`cache.GrowingLayer`) on the model's own path.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import fields
from operator import is_
from typing import Any

import torch
from compress_kernels import block as kernel

from compress.decoding.cache import adopt
from compress.decoding.plan import Plan, Unfit, tasks_of

logger = logging.getLogger(__name__)

_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "return_dict", "logits_to_keep"}


class Decoding:
    """What a model knows of its native decoder; `model.decoding` after `attach`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.enabled = True
        self._plan: Plan | str | None = None  # made at the first step; a reason where it cannot be
        self._device = ""
        self._lock = threading.Lock()  # the decoder has one workspace

    @property
    def path(self) -> str:
        """ "native", or "transformers" and why."""
        plan = self.plan()
        return f"transformers ({plan})" if isinstance(plan, str) else "native"

    def plan(self) -> Plan | str:
        """The native decoder, made again where the model has changed; or the reason why there is none."""
        if not self.enabled:
            return "it was switched off"
        plan = self._plan
        if isinstance(plan, Plan) and plan.holds(self.model):
            return plan
        if isinstance(plan, str) and self._device == _state(self.model):
            return plan
        self._device = _state(self.model)
        try:
            self._plan = Plan(self.model)
        except Unfit as why:
            self._plan = str(why)
            _say_once(type(self.model).__name__, str(why))
        return self._plan

    def forward(self, kwargs: dict[str, Any]) -> Any:
        """The output of a call that the native decoder can answer, or None. An empty cache is given growing layers."""
        cache = kwargs.get("cache")
        cache = kwargs.get("past_key_values") if cache is None else cache
        ids = kwargs.get("input_ids")
        if cache is None or ids is None or ids.dim() != 2 or torch.compiler.is_compiling() or self.model.training:
            return None
        plan = self.plan()
        if isinstance(plan, str) or plan.interrupted() or not adopt(cache, plan.blocks):
            return None
        if ids.shape[1] != 1 or any(value is not None for key, value in kwargs.items() if key not in _KNOWN):
            return None
        past, (B, _) = cache.layers[0].length, ids.shape
        if past == 0 or B > kernel.ROWS or kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
            return None
        if not isinstance(kwargs.get("logits_to_keep") or 0, int):
            return None
        first = _first(kwargs.get("attention_mask"), B, past + 1)
        positions = kwargs.get("position_ids")
        rows = [past] * B if positions is None else _positions(positions, B)
        if first is None or rows is None:
            return None
        logits = self.step(plan, ids, cache.layers, first, rows)
        return None if logits is None else _output(logits.unsqueeze(1), cache)

    def step(self, plan: Plan, ids: torch.Tensor, layers: list[Any], first: torch.Tensor, positions: list[int]) -> Any:
        """Logits (B, V) fp32 of the tokens ids (B, 1), whose keys and values are appended; None where the cache is not theirs.

        `first` (B,) is the first place that a row attends to, `positions` are the tokens' in their texts.
        """
        slot, B = layers[0].length, len(ids)
        if any(layer.length != slot for layer in layers):
            return None
        with self._lock:
            if slot == layers[0].capacity:
                for layer in layers:
                    layer.make_room(1)
            buffers = [layer.buffer for layer in layers]
            shape = (2, B, plan.decoder.shape.kv_heads, layers[0].capacity, plan.decoder.shape.head_dim)
            if not _fits(buffers[0], shape, plan.dtype) or (buffers[0].requires_grad and torch.is_grad_enabled()):
                return None
            held = layers[0].held
            if held is None or len(held[0]) != len(buffers) or not all(map(is_, buffers, held[0])):
                if not all(_fits(b, shape, plan.dtype) for b in buffers):
                    return None
                held = layers[0].held = buffers, kernel.pointers(buffers)
            cos, sin = plan.rope.at(positions)
            x = self.model.model.embed_tokens(ids).view(B, -1)
            y = plan.decoder.step(x, held[1], layers[0].capacity, slot, first, cos, sin)
            for layer in layers:
                layer.length += 1
        return y

    def __reduce__(self) -> Any:
        return Decoding, (self.model,)


def _fits(buffer: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the kernel can read and write a cache's buffer: it is handed an address alone."""
    return buffer.shape == shape and buffer.dtype == dtype and buffer.is_contiguous()


def _state(model: Any) -> str:
    """What a reason may depend on."""
    return f"{model.device} {model.dtype} {tasks_of(model)}"


@functools.cache
def _say_once(name: str, why: str) -> None:
    logger.info("decode: %s runs token by token in transformers, not natively: %s", name, why)


def _first(mask: Any, B: int, length: int) -> torch.Tensor | None:
    """The first place (B,) that each row attends to; None where the mask hides others too."""
    if mask is None:
        return torch.zeros(B, dtype=torch.int64)
    if not isinstance(mask, torch.Tensor) or mask.shape != (B, length):
        return None
    count = (mask != 0).sum(1)
    first = length - count
    return first if B and torch.equal(mask.ne(0).to(torch.int8).argmax(1), first) and bool((count > 0).all()) else None


def _positions(ids: Any, B: int) -> list[int] | None:
    """Positions of B rows from (B, 1) or (1, 1) ids; None where they are others."""
    if ids.dim() != 2 or ids.shape[1] != 1 or ids.shape[0] not in (1, B):
        return None
    rows: list[int] = ids.expand(B, 1).flatten().tolist()
    return rows if min(rows) >= 0 else None


@functools.cache
def _answer() -> tuple[Any, str]:
    """transformers' class of outputs, and its name for the cache."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    known = {field.name for field in fields(CausalLMOutputWithPast)}
    return CausalLMOutputWithPast, "cache" if "cache" in known else "past_key_values"


def cache_name() -> str:
    """What this version of transformers calls the cache among a forward's arguments."""
    return _answer()[1]


def _output(logits: torch.Tensor, cache: Any) -> Any:
    Output, name = _answer()
    return Output(logits=logits, **{name: cache})


def _forward(decoding: Decoding, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = None if args else decoding.forward(kwargs)
    return original(*args, **kwargs) if output is None else output


def attach(model: Any) -> Any:
    """Let a model decode natively where it can, and return it; `model.decoding` says whether it does, and why not."""
    decoding, original = Decoding(model), model.forward
    object.__setattr__(model, "decoding", decoding)  # no submodule: the model is its attribute
    model.forward = functools.update_wrapper(functools.partial(_forward, decoding, original), original)
    return model

"""One token of a Llama-3-8B-shaped model on the GPU at hand: W4 linears and head beside dense bf16 ones, all else the same.

Norms, rotary embedding, a cache of 512 tokens, grouped attention, the activation and the choice of the next token are torch's own;
q, k, v and gate, up are one linear on both sides. A step is one CUDA graph, weights and cache are random, and 5 or 16 GB of
weights come from memory by themselves.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from compress_kernels import gpu_tune
from compress_kernels.int_grouped import triton

GROUP = 128
BATCHES = (1, 8, 32, 64)
Linear = Callable[[torch.Tensor], torch.Tensor]
Times = Callable[[list[Callable[[], object]]], list[float]]


@dataclass(frozen=True)
class Shape:
    """A model's sizes; Llama-3-8B's."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    inner: int = 14336
    vocabulary: int = 128256
    past: int = 512  # tokens in the cache

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(O, I) of a block's linears."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head
        return [(qkv, self.hidden), (self.hidden, self.heads * self.head), (2 * self.inner, self.hidden), (self.hidden, self.inner)]


SMALL = Shape(256, 1, 2, 1, 128, 256, 256, 4)


class Model:
    """A model of random weights whose linears are given."""

    def __init__(self, shape: Shape, blocks: list[list[Linear]], head: Linear, batch: int, device: torch.device) -> None:
        s = self.shape = shape
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self.blocks, self.head = blocks, head
        self.embedding = torch.randn(s.vocabulary, s.hidden, **options)
        self.norms = torch.ones(2 * s.layers + 1, s.hidden, **options)
        self.cache = torch.randn(s.layers, 2, batch, s.kv_heads, s.past + 1, s.head, **options)
        angles = s.past / 500000.0 ** (torch.arange(0, s.head, 2, device=device) / s.head)
        self.cos, self.sin = angles.cos().repeat(2).bfloat16(), angles.sin().repeat(2).bfloat16()
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat((-b, a), -1) * self.sin

    def step(self) -> torch.Tensor:
        """The next token of every text (B,), which is the input of the next step."""
        s, B = self.shape, len(self.ids)
        x = self.embedding[self.ids]
        for i, (qkv, out, gate_up, down) in enumerate(self.blocks):
            parts = qkv(F.rms_norm(x, (s.hidden,), self.norms[2 * i])).view(B, s.heads + 2 * s.kv_heads, 1, s.head)
            q, k, v = parts.split((s.heads, s.kv_heads, s.kv_heads), 1)
            self.cache[i, 0, :, :, s.past :] = self._turned(k)
            self.cache[i, 1, :, :, s.past :] = v
            mixed = F.scaled_dot_product_attention(self._turned(q), self.cache[i, 0], self.cache[i, 1], enable_gqa=True)
            x = x + out(mixed.reshape(B, s.heads * s.head))
            gate, up = gate_up(F.rms_norm(x, (s.hidden,), self.norms[2 * i + 1])).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        self.ids.copy_(self.head(F.rms_norm(x, (s.hidden,), self.norms[-1])).argmax(-1))
        return self.ids


def _random(O: int, I: int, device: torch.device) -> torch.Tensor:
    return torch.empty(O, I, dtype=torch.bfloat16, device=device).normal_(std=I**-0.5)


def decode(device: torch.device, times: Times, bytes_s: float, small: bool) -> Iterator[dict[str, Any]]:
    """A row for every batch size; `times` gives microseconds per call, `bytes_s` is the memory's."""
    shape = SMALL if small else Shape()
    sizes = [*shape.linears * shape.layers, (shape.vocabulary, shape.hidden)]
    ours = [gpu_tune.random_weight(O, I, 4, GROUP, False, torch.bfloat16, device) for O, I in sizes]
    dense = [_random(O, I, device) for O, I in sizes]
    held = sum(t.numel() * t.element_size() for w in ours for t in (w.words, w.stats))
    sides: dict[str, list[Linear]] = {
        "ours": [partial(triton.linear, w=w) for w in ours],
        "dense": [partial(F.linear, weight=W) for W in dense],
    }
    for batch in (2,) if small else BATCHES:
        us = {}
        for side, (*linears, head) in sides.items():
            blocks = [linears[i : i + 4] for i in range(0, len(linears), 4)]
            model = Model(shape, blocks, head, batch, device)
            us[side] = statistics.median(times([model.step]))
            if not bool(((model.ids >= 0) & (model.ids < shape.vocabulary)).all()):
                raise RuntimeError(f"{side}: tokens {model.ids.tolist()} are none of the vocabulary's")
            cached = model.cache.numel() * 2
            del model
        yield {
            "decode": "Llama-3-8B's shape, W4 g128 and head", "layers": shape.layers, "batch": batch, "past": shape.past,
            "us": us["ours"], "dense_us": us["dense"], "speedup": us["dense"] / us["ours"], "tokens_s": batch / us["ours"] * 1e6,
            "dense_tokens_s": batch / us["dense"] * 1e6, "roofline": (held + cached) / bytes_s * 1e6 / us["ours"],
        }  # fmt: skip

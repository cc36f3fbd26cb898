"""The reverse walk: exact gradients of the mean next-token cross entropy, one block in memory at a time.

    forward   block by block without gradients; every block's inputs are kept, in RAM or on disk
    head      loss and dL/dhidden, the vocabulary in pieces (`models.head`)
    backward  last block to first: run again with gradients from the kept input, reduce dyᵀ x of every linear at once, and hand
              dL/dinput to the block below

The weight gradients of two blocks never lie side by side: a `Reducer` makes of each block's what its method keeps. Every block is a
resume point. A resumed run replays the forward pass and the backward pass of the finished blocks (without weight gradients), so a
killed and an unbroken run compute the same numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from compress.checkpoint import dtypes
from compress.errors import CompressError
from compress.models.head import Head
from compress.pipeline import memory
from compress.pipeline.blocks import Blocks, Tensors
from compress.pipeline.layout import Layout
from compress.pipeline.resume import Kept
from compress.pipeline.states import Store
from compress.types import Block, Progress, Reducer

logger = logging.getLogger(__name__)
_HEAD_TOKENS = 4096  # tokens whose loss is computed together
Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]  # linear -> its inputs (T, I) and dL/dy (T, O)


@dataclass(frozen=True)
class Reverse:
    """One reverse walk; nothing in it changes while it runs. Results lie in `folder`, a file per block."""

    blocks: Blocks
    layout: Layout
    tokens: torch.Tensor  # (N, T)
    reducers: Sequence[Callable[[Block], Reducer]]
    folder: Path
    states: Path | None  # folder for the kept inputs; None: in RAM
    job: str = ""  # fingerprint: another job's results are not read
    progress: Callable[[Progress], None] | None = None
    surveyed: Callable[[int], Tensors] | None = None  # what the method's survey kept of a block

    @property
    def _kept(self) -> Kept:
        return Kept(self.folder, self.job)

    def path(self, index: int) -> Path:
        return self._kept.path(index)

    def result(self, index: int) -> Tensors:
        """What the reducers kept of a block."""
        return self._kept.read(index)

    @torch.no_grad()
    def run(self) -> None:
        """Compute what is missing, from the last block down."""
        self._kept.open()
        missing = [i for i in range(len(self.blocks)) if not self._kept.has(i)]
        if not missing:
            return
        head = Head(self.blocks.skeleton, self.blocks.view, self.blocks.dtype)
        inputs = self._forward()
        upstream = at_head(self.blocks, self.tokens, self.states, head, inputs[-1])
        last, began = missing[-1], time.monotonic()  # results below it are made again, to the same bytes
        if last + 1 < len(self.blocks):
            logger.info("resuming the reverse walk at block %d of %d", last + 1, len(self.blocks))
        for index in range(len(self.blocks) - 1, -1, -1):
            start = time.monotonic()
            upstream = self._block(index, inputs[index], upstream, collect=index <= last)
            inputs[index].close()
            memory.trim()
            if index <= last and self.progress is not None:
                now = time.monotonic()
                left = (now - began) / (len(self.blocks) - index) * index
                self.progress(Progress(index, len(self.blocks), now - start, left, memory.rss()))

    def _forward(self) -> list[Store]:
        """Every block's inputs, and last the last block's outputs; one (1, T, D) tensor per sample."""
        blocks = self.blocks
        kept = [Store(self.states)]
        for x in blocks.skeleton.embed(blocks.view, self.tokens, 1, blocks.device, blocks.dtype):
            kept[0].append(x)
        for index in range(len(blocks)):
            params = blocks.compute(index, blocks.load(index))
            kept.append(Store(self.states))
            for n in range(len(self.tokens)):
                out = blocks.skeleton.run(index, params, kept[index][n].to(blocks.device))
                finite(out, f"block {index}: its output")
                kept[-1].append(out)
            del params
            memory.trim()
        return kept

    def _block(self, index: int, inputs: Store, upstream: Store, collect: bool) -> Store:
        """dL/dinput of a block for every sample; with `collect`, its reducers' results are written."""
        blocks = self.blocks
        block = blocks.split(index, blocks.load(index), self.layout)
        if self.surveyed is not None:
            block = replace(block, survey=self.surveyed(index))
        params = blocks.compute(index, blocks.tensors(block))
        reducers = [make(block) for make in self.reducers] if collect else []
        out = Store(self.states)
        for n in range(len(upstream)):
            x, dy = inputs[n].to(blocks.device), upstream[n].to(blocks.device)
            dx, seen = self._backward(index, params, x, dy, tuple(block.weights) if collect else ())
            for name, pair in seen.items():
                for reducer in reducers:
                    reducer.add(name, *pair)
            finite(dx, f"block {index}: the gradient of its input")
            out.append(dx)
        upstream.close()
        if collect:
            kept: Tensors = {}
            for reducer in reducers:
                kept |= {name: t.cpu().contiguous() for name, t in reducer.result().items()}
            self._kept.write(index, kept)
        return out

    def _backward(
        self, index: int, params: Tensors, x: torch.Tensor, dy: torch.Tensor, linears: Sequence[str]
    ) -> tuple[torch.Tensor, Seen]:
        """(dL/dx, what every linear saw) of one sample; a linear that is called twice sees both calls' tokens."""
        calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
            return lambda _module, args, y: calls.append((name, args[0].detach(), y))

        module = self.blocks.skeleton.blocks[index]
        handles = [module.get_submodule(name).register_forward_hook(note(name)) for name in linears]
        try:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                out = self.blocks.skeleton.run(index, params, x)
                dx, *grads = torch.autograd.grad(out, [x, *(y for *_, y in calls)], dy, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        seen: Seen = {}
        for (name, inputs, _), grad in zip(calls, grads, strict=True):
            if grad is None:  # its output was thrown away
                continue
            pair = (inputs.reshape(-1, inputs.shape[-1]), grad.reshape(-1, grad.shape[-1]))
            seen[name] = (torch.cat([seen[name][0], pair[0]]), torch.cat([seen[name][1], pair[1]])) if name in seen else pair
        return dx, seen


def at_head(blocks: Blocks, tokens: torch.Tensor, states: Path | None, head: Head, hidden: Store) -> Store:
    """dL/dhidden of every sample of `tokens` (N, T); closes `hidden`."""
    at_once = max(1, _HEAD_TOKENS // tokens.shape[1])
    out = Store(states)
    for start in range(0, len(tokens), at_once):
        samples = range(start, min(start + at_once, len(tokens)))
        x = torch.cat([hidden[n] for n in samples]).to(blocks.device)
        loss, gradient = head.gradient(x, tokens[start : samples.stop])
        finite(loss, "the loss")
        finite(gradient, "the loss's gradient")
        for one in gradient.split(1):
            out.append(one)
    hidden.close()
    return out


def finite(tensor: torch.Tensor, what: str) -> None:
    if not dtypes.finite(tensor):
        raise CompressError(
            f"{what} holds NaN or Inf on the calibration text",
            hint="the checkpoint is damaged, or its dtype overflows: try a bfloat16 or float32 copy",
        )

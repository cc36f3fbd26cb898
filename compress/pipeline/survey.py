"""A method's own walk over all blocks before the one that compresses: what it must know of the whole model first.

`survey(block, stats, config, dtype)` returns what shall be kept of a block, a file each, and the weights that later blocks shall
see in place of its own (none: dense). Every block is a resume point; a resumed walk replays the states through the finished ones.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from compress.pipeline import memory
from compress.pipeline.blocks import Tensors
from compress.pipeline.resume import Kept
from compress.pipeline.walk import BlockWalk, Walk
from compress.types import Block, Progress

logger = logging.getLogger(__name__)
_SEEN = "seen:"  # prefix of the weights that later blocks see


class Survey(BlockWalk):
    """One survey; its results lie in `folder`."""

    def __init__(self, walk: Walk, folder: Path, job: str) -> None:
        super().__init__(walk, bool(getattr(walk.config, "survey_propagate", False)) and walk.tokens is not None)
        self._kept = Kept(folder, job)

    @property
    def recovers(self) -> bool:
        """No: nothing is trained yet, so the dense model's states are not carried along."""
        return False

    def result(self, index: int) -> Tensors:
        """What the method kept of a block."""
        return self._kept.read(index, lambda name: not name.startswith(_SEEN))

    @torch.no_grad()
    def run(self) -> None:
        """Walk over what is missing."""
        walk, blocks = self.walk, len(self.blocks)
        self._kept.open()
        done = 0
        while done < blocks and self._kept.has(done):
            done += 1
        if done == blocks:
            return
        if walk.tokens is not None:
            self._start(done)
        began = time.monotonic()
        for index in range(done, blocks):
            start = time.monotonic()
            self._block(index)
            memory.trim()
            now = time.monotonic()
            if walk.progress is not None:
                left = (now - began) / (index + 1 - done) * (blocks - index - 1)
                walk.progress(Progress(index, blocks, now - start, left, memory.rss(), what="survey"))
        if self.states is not None:
            self.states.close()

    def _block(self, index: int) -> None:
        walk = self.walk
        block = self.split(index)
        dtype = walk.layout.scale_dtype
        if self.states is None:
            kept, seen = walk.method.survey(block, {}, walk.config, dtype)
        else:
            params = self.blocks.compute(index, self.blocks.tensors(block))
            collect = walk.method.survey_collects(block, walk.config)
            kept, seen = self.observe(
                block, params, collect, lambda stats, _: walk.method.survey(block, stats, walk.config, dtype)
            )  # fmt: skip
            if self.propagate and index + 1 < len(self.blocks):
                self._advance(index, params | self.blocks.params(index, _weights(seen)))
        if self.propagate:
            kept = {**kept, **{_SEEN + n: W for n, W in seen.items()}}
        self._kept.write(index, kept)

    def _finished(self, index: int) -> Tensors:
        """A surveyed block's parameters as later blocks see them."""
        block: Block = self.split(index)
        seen = {n.removeprefix(_SEEN): W for n, W in self._kept.read(index, lambda name: name.startswith(_SEEN)).items()}
        return self.blocks.compute(index, {**self.blocks.tensors(block), **_weights(seen)})


def _weights(seen: Tensors) -> Tensors:
    return {f"{name}.weight": W for name, W in seen.items()}

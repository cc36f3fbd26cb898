"""What every forward walk does: calibration states run through the blocks one by one, observed where a method asks.

Peak memory is one block in the compute dtype and in the checkpoint's, its statistics, and the calibration states (which may
lie on disk). A resumed walk replays the blocks before it to get the states back, so a killed and an unbroken run compute the same
numbers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from compress.checkpoint import dtypes
from compress.errors import CompressError
from compress.models.skeleton import Skeleton
from compress.models.view import CheckpointView
from compress.pipeline import memory
from compress.pipeline.blocks import Blocks, Tensors
from compress.pipeline.layout import Layout
from compress.pipeline.observe import Enough, Observer
from compress.pipeline.states import ModuleInputs, Store
from compress.stats import InputStats
from compress.types import Block, Collect, Progress, Runner

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Walk:
    """Everything that the walk needs; nothing in it changes while it runs."""

    skeleton: Skeleton
    view: CheckpointView
    layout: Layout
    method: ModuleType
    config: Any
    tokens: torch.Tensor | None  # (N, T); None for methods without data
    batch_size: int
    device: str
    dtype: torch.dtype
    folder: Path | None  # for the calibration states; None: in RAM
    progress: Callable[[Progress], None] | None = None
    gradients: Callable[[int], Tensors] | None = None  # what the reverse walk kept of a block
    surveyed: Callable[[int], Tensors] | None = None  # what the method's own walk before this one kept of it

    @property
    def sparse(self) -> bool:
        """Whether the method prunes."""
        return getattr(self.method, "VERB", "") == "prune"


class _BlockRunner:
    """`types.Runner`: modules of one dense block over the kept inputs, the unchanged module's outputs computed once."""

    def __init__(
        self,
        walk: Walk,
        index: int,
        params: Tensors,
        inputs: Mapping[str, ModuleInputs],
        batches: int,
        folder: Path | None,
    ):
        self.batches = batches
        self._walk, self._index, self._params, self._inputs, self._folder = walk, index, params, inputs, folder
        self._dense: tuple[str, Store, dict[int, int]] | None = None

    def __call__(self, module: str, overrides: Mapping[str, torch.Tensor], batches: range) -> Iterator[torch.Tensor]:
        if overrides:
            changed = {f"{n}.weight": self._stored(n, W) for n, W in overrides.items()}
            return (self._run(module, self._params | changed, b) for b in batches)
        return (self._reference(module, b) for b in batches)

    def _stored(self, name: str, W: torch.Tensor) -> torch.Tensor:
        target = self._walk.layout.targets[self._walk.skeleton.prefix(self._index) + name]
        return (W.T if target.transposed else W).to(self._walk.dtype)

    def _run(self, module: str, params: Tensors, batch: int) -> torch.Tensor:
        args, kwargs = self._inputs[module][batch]
        device = self._walk.device
        args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
        kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return self._walk.skeleton.run_module(self._index, module, params, args, kwargs)

    def _reference(self, module: str, batch: int) -> torch.Tensor:
        if self._dense is None or self._dense[0] != module:
            self.close()
            self._dense = (module, Store(self._folder), {})
        _, store, where = self._dense
        if batch not in where:
            store.append(self._run(module, self._params, batch))
            where[batch] = len(store) - 1
        return store[where[batch]].to(self._walk.device)

    def close(self) -> None:
        if self._dense is not None:
            self._dense[1].close()
            self._dense = None


class BlockWalk(ABC):
    """The calibration states on their way through the blocks."""

    def __init__(self, walk: Walk, propagate: bool) -> None:
        self.walk, self.propagate = walk, propagate
        self.blocks = Blocks(walk.skeleton, walk.view, walk.device, walk.dtype)
        self.states: Store | None = None
        self.dense: Store | None = None  # the dense model's states beside them, where a block is trained towards them
        self.weights: list[torch.Tensor] = []  # of the tokens (B, T), per batch, where the method weighs them

    @abstractmethod
    def _finished(self, index: int) -> Tensors:
        """A finished block's parameters as later blocks see them."""

    def _start(self, done: int) -> None:
        """Embed the tokens and run them through the blocks that are done."""
        walk = self.walk
        assert walk.tokens is not None
        self.states = Store(walk.folder)
        for batch in walk.skeleton.embed(walk.view, walk.tokens, walk.batch_size, walk.device, walk.dtype):
            self.states.append(batch)
        if self.recovers:
            self.dense = Store(walk.folder)
            for b in range(len(self.states)):
                self.dense.append(self.states[b])
        if done:
            logger.info("resuming at block %d of %d: replaying the calibration states", done + 1, len(walk.skeleton.blocks))
        for index in range(done):
            self._advance(index, self._finished(index) if self.propagate else self._dense(index))
            if self.dense is not None:
                self.dense = self._outputs(index, self._dense(index), self.dense)
            memory.trim()

    def _dense(self, index: int) -> Tensors:
        """A block's parameters as the checkpoint has them."""
        return self.blocks.compute(index, self.blocks.load(index))

    @property
    def recovers(self) -> bool:
        """Whether blocks are trained towards the dense model's."""
        return bool(getattr(self.walk.config, "recover", 0))

    def _outputs(self, index: int, params: Tensors, inputs: Store) -> Store:
        """A block's outputs; closes its inputs."""
        out = Store(self.walk.folder)
        for b in range(len(inputs)):
            out.append(self.walk.skeleton.run(index, params, inputs[b].to(self.walk.device)))
        inputs.close()
        return out

    def split(self, index: int) -> Block:
        """A block as methods see it, with what earlier walks kept of it."""
        walk = self.walk
        block = self.blocks.split(index, self.blocks.load(index), walk.layout)
        gradient, survey = (found(index) if found is not None else {} for found in (walk.gradients, walk.surveyed))
        return replace(block, gradient=gradient, survey=survey)

    def observe(self, block: Block, params: Tensors, collect: Collect, then: Callable[[Mapping[str, InputStats], Runner], T]) -> T:
        """Run the states through the block as `params` make it, collect what is asked for, and answer with `then`."""
        walk, index = self.walk, block.index
        assert walk.tokens is not None
        assert self.states is not None
        observer = Observer(walk.skeleton, walk.layout, index, collect, walk.tokens.numel(), walk.folder)
        batches = len(self.states)
        with observer.hooks():
            self._advance(index, params, keep=self.propagate, observer=observer)
        stats = {n: observer.stats[group[0]] for group in block.groups for n in group if group[0] in observer.stats}
        runner = _BlockRunner(walk, index, params, observer.inputs, batches, walk.folder)
        answer = then(stats, runner)
        runner.close()
        observer.close()
        return answer

    def _advance(self, index: int, params: Tensors, keep: bool = False, observer: Observer | None = None) -> None:
        """Run the states through a block; with `keep`, only its hooks matter: they may stop it, and the states stay."""
        assert self.states is not None
        after = Store(self.walk.folder)
        for b in range(len(self.states)):
            if observer is not None:
                observer.expect(self.weights[b] if self.weights else None, keep)
            try:
                out = self.walk.skeleton.run(index, params, self.states[b].to(self.walk.device))
            except Enough:
                continue
            if not dtypes.finite(out):
                raise CompressError(
                    f"block {index}: its output holds NaN or Inf on the calibration text",
                    hint="the checkpoint is damaged, or its dtype overflows: try a bfloat16 or float32 copy",
                )
            if not keep:
                after.append(out)
        if not keep:
            self.states.close()
            self.states = after

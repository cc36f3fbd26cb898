"""The forward walk: one block at a time, load -> run and collect -> compress -> write -> run on.

Peak memory is one block in the compute dtype and in the checkpoint's, its statistics, and the calibration states (which may
lie on disk). Every block is a resume point; a resumed run replays the blocks before it to get the states back, so a killed and
an unbroken run compute the same numbers.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from compress import registry
from compress.checkpoint import dtypes
from compress.checkpoint.writer import CheckpointWriter
from compress.errors import CompressError
from compress.models.skeleton import Skeleton
from compress.models.view import CheckpointView, check_finite
from compress.pipeline import memory
from compress.pipeline.blocks import Blocks, Tensors
from compress.pipeline.layout import Layout, dense
from compress.pipeline.observe import Enough, Observer, Tokens
from compress.pipeline.resume import WorkDir
from compress.pipeline.states import ModuleInputs, Store
from compress.types import Block, Progress, Result

logger = logging.getLogger(__name__)


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
    states_on_disk: bool
    progress: Callable[[Progress], None] | None = None
    gradients: Callable[[int], Tensors] | None = None  # what the reverse walk kept of a block


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


class Forward:
    """One walk over all blocks, and then over what is not a block."""

    def __init__(self, walk: Walk, writer: CheckpointWriter, work: WorkDir) -> None:
        self.walk, self.writer, self.work = walk, writer, work
        self.blocks = Blocks(walk.skeleton, walk.view, walk.device, walk.dtype)
        self.folder = work.path if walk.states_on_disk else None
        self.propagate = bool(getattr(walk.config, "propagate", False))
        self.states: Store | None = None
        self.weights: list[torch.Tensor] = []  # of the tokens (B, T), per batch, where the method weighs them

    @torch.no_grad()
    def run(self) -> None:
        """Compress every block from the resume point on, then copy the rest."""
        walk, blocks = self.walk, len(self.walk.skeleton.blocks)
        done = self.work.done
        if done < blocks and walk.tokens is not None:
            self._start(done)
        began = time.monotonic()
        for index in range(done, blocks):
            start = time.monotonic()
            bits, error = self._block(index)
            self.writer.flush()
            self.work.commit(index + 1)
            memory.trim()
            now = time.monotonic()
            left = (now - began) / (index + 1 - done) * (blocks - index - 1)
            report = Progress(index, blocks, now - start, left, memory.rss(), error, bits)
            self.work.log({"block": index, "error": error, "bits": bits, "seconds": report.seconds, "rss": report.rss})
            if walk.progress is not None:
                walk.progress(report)
        if self.states is not None:
            self.states.close()
        if self.work.done == blocks:
            self._rest()
            self.writer.flush()
            self.work.commit(blocks + 1)

    def _start(self, done: int) -> None:
        walk = self.walk
        assert walk.tokens is not None
        self.states = Store(self.folder)
        for batch in walk.skeleton.embed(walk.view, walk.tokens, walk.batch_size, walk.device, walk.dtype):
            self.states.append(batch)
        if done:
            logger.info("resuming at block %d of %d: replaying the calibration states", done + 1, len(walk.skeleton.blocks))
        for index in range(done):
            params = self._compressed(index) if self.propagate else self.blocks.compute(index, self.blocks.load(index))
            self._advance(index, params)
            del params
            memory.trim()

    # -- one block ----------------------------------------------------------------------------------------------------

    def _compressed(self, index: int) -> Tensors:
        """A finished block's parameters, read back from the artifact."""
        walk, prefix = self.walk, self.walk.skeleton.prefix(index)
        tensors: Tensors = {}
        for name in walk.view.names:
            if name.startswith(prefix):
                target = walk.layout.targets.get(name.removesuffix(".weight"))
                if target is None or walk.layout.name == "dense":
                    tensors[name.removeprefix(prefix)] = self.blocks.turn(name, self.writer.read(name))
                else:
                    tensors[name.removeprefix(prefix)] = dense(walk.layout.packed(target, self.writer.read))
        return self.blocks.compute(index, tensors)

    def _block(self, index: int) -> tuple[float, float]:
        walk = self.walk
        gradient = walk.gradients(index) if walk.gradients is not None else None
        block = self.blocks.split(index, self.blocks.load(index), walk.layout, gradient)
        if self.states is None:
            result = walk.method.compress(block, {}, walk.config, None, walk.layout.scale_dtype)
        else:
            result = self._with_data(block)
        return self._write(block, result)

    def _with_data(self, block: Block) -> Result:
        """Collect and compress, stage by stage; then run the states on."""
        walk, index = self.walk, block.index
        params = self.blocks.compute(index, self.blocks.tensors(block))
        stages = walk.method.stages(block, walk.config) if hasattr(walk.method, "stages") else (tuple(block.weights),)
        self.weights = self._token_weights(index, params)
        assert self.propagate or len(stages) == 1, "a method with stages calibrates on compressed blocks"
        result = Result({})
        for number, stage in enumerate(stages):
            part = replace(block, weights={n: block.weights[n] for n in stage})
            found = self._stage(part, params)
            result = result.merge(found)
            if number + 1 < len(stages):
                params |= self.blocks.params(index, self._linears(part, found))
        del params
        if self.propagate and index + 1 < len(self.blocks):  # nobody reads the last block's outputs
            self._advance(index, self.blocks.compute(index, self._as_stored(block, result)))
        return result

    def _token_weights(self, index: int, params: Tensors) -> list[torch.Tensor]:
        """The method's weights of the calibration tokens at this block, per batch; none where it has none."""
        walk = self.walk
        if not hasattr(walk.method, "token_weights"):
            return []
        assert walk.tokens is not None
        assert self.states is not None
        counts = walk.tokens.flatten().bincount()[walk.tokens]
        out = []
        for b, ids in enumerate(counts.split(walk.batch_size)):
            x = self.states[b].to(walk.device)
            run = functools.partial(walk.skeleton.run, index, params, x)
            view = Tokens(walk.skeleton.blocks[index], run, x, ids.to(walk.device))
            weights = walk.method.token_weights(view, walk.config)
            if weights is None:
                return []
            out.append(weights)
        return out

    def _stage(self, block: Block, params: Tensors) -> Result:
        """Statistics of the block as `params` make it, and the method's answer for the linears of `block`."""
        walk, index = self.walk, block.index
        assert walk.tokens is not None
        assert self.states is not None
        collect = walk.method.collects(block, walk.config)
        observer = Observer(walk.skeleton, walk.layout, index, collect, walk.tokens.numel(), self.folder)
        batches = len(self.states)
        with observer.hooks():
            self._advance(index, params, keep=self.propagate, observer=observer)
        stats = {n: observer.stats[group[0]] for group in block.groups for n in group if group[0] in observer.stats}
        runner = _BlockRunner(walk, index, params, observer.inputs, batches, self.folder)
        result: Result = walk.method.compress(block, stats, walk.config, runner, walk.layout.scale_dtype)
        runner.close()
        observer.close()
        return result

    @staticmethod
    def _linears(block: Block, result: Result) -> Tensors:
        return {f"{n}.weight": dense(result.packed[n]) for n in block.weights}

    def _as_stored(self, block: Block, result: Result) -> Tensors:
        """A compressed block's tensors with the rounding that the artifact gives them: what a resumed run reads back."""
        prefix, plan = self.walk.skeleton.prefix(block.index), self.writer.plan
        tensors = {**block.tensors, **result.tensors, **self._linears(block, result)}
        return {n: t.to(dtypes.TORCH[plan[prefix + n].dtype]) if prefix + n in plan else t for n, t in tensors.items()}

    def _advance(self, index: int, params: Tensors, keep: bool = False, observer: Observer | None = None) -> None:
        """Run the states through a block; with `keep`, only its hooks matter: they may stop it, and the states stay."""
        assert self.states is not None
        after = Store(self.folder)
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

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, block: Block, result: Result) -> tuple[float, float]:
        """Write a block's compressed linears and its other tensors; returns (bits per weight, mean error)."""
        walk, prefix = self.walk, self.walk.skeleton.prefix(block.index)
        assert result.packed.keys() == block.weights.keys(), "a method must pack exactly the linears that it was given"
        assert result.tensors.keys() <= block.tensors.keys(), "a method may only change tensors that exist"
        version = registry.by_kind(walk.layout.kind).VERSION
        weights = stored = 0
        for name, packed in result.packed.items():
            target = walk.layout.targets[prefix + name]
            bits = 0
            for full, tensor in walk.layout.tensors(target, packed).items():
                self.writer.write(full, tensor)
                bits += 8 * tensor.numel() * tensor.element_size()
            size = target.shape[0] * target.shape[1]
            weights, stored = weights + size, stored + bits
            self.work.state["linears"][target.name] = {
                "kind": walk.layout.kind, "version": version, "params": dict(packed.params), "shape": list(target.shape),
                "bits": float(f"{bits / size:.6g}"), "error": float(f"{result.errors[name]:.6g}"),
            }  # fmt: skip
        for name in block.tensors:
            tensor = self.blocks.turn(prefix + name, result.tensors.get(name, block.tensors[name]))
            self._write_dense(prefix + name, tensor)
        if result.record:
            self.work.state["search"].append({"block": block.index, **result.record})
        return stored / weights if weights else 0.0, sum(result.errors.values()) / max(1, len(result.errors))

    def _write_dense(self, name: str, tensor: torch.Tensor) -> None:
        check_finite(name, tensor)
        planned = self.writer.plan[name]
        self.writer.write(name, self._cast(name, tensor, planned.dtype))

    def _cast(self, name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        out = tensor.to(dtypes.TORCH[dtype])
        if not dtypes.finite(out):
            raise CompressError(f"{name}: does not fit into {dtype}", hint="use the default --format pack-quantized")
        return out

    def _rest(self) -> None:
        """Copy everything that is in no block, piece by piece."""
        walk = self.walk
        prefixes = tuple(walk.skeleton.prefix(i) for i in range(len(walk.skeleton.blocks)))
        for name in walk.view.names:
            if name.startswith(prefixes):
                continue
            start = 0
            for piece in walk.view.chunks(name):
                self.writer.write_piece(name, start, self._cast(name, piece, self.writer.plan[name].dtype))
                start += piece.numel()

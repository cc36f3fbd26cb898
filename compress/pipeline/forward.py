"""The forward walk: one block at a time, load -> run and collect -> compress -> write -> run on. Every block is a resume point."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from compress import registry
from compress.checkpoint import dtypes
from compress.checkpoint.writer import CheckpointWriter
from compress.errors import CompressError
from compress.methods._pack import relative_error
from compress.models.view import check_finite
from compress.pipeline import heads, memory
from compress.pipeline.blocks import Tensors
from compress.pipeline.layout import dense
from compress.pipeline.observe import Tokens
from compress.pipeline.recover import Recovery
from compress.pipeline.resume import WorkDir
from compress.pipeline.walk import BlockWalk, Walk
from compress.stats import InputStats
from compress.types import Block, Packed, Progress, Result, Runner

logger = logging.getLogger(__name__)


class Forward(BlockWalk):
    """One walk over all blocks, and then over what is not a block."""

    def __init__(self, walk: Walk, writer: CheckpointWriter, work: WorkDir) -> None:
        super().__init__(walk, bool(getattr(walk.config, "propagate", False)))
        self.writer, self.work = writer, work

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

    # -- one block ----------------------------------------------------------------------------------------------------

    def _finished(self, index: int) -> Tensors:
        """A finished block's parameters, read back from the artifact."""
        walk, prefix = self.walk, self.walk.skeleton.prefix(index)
        tensors: Tensors = {}
        for name in walk.view.names:
            if name.startswith(prefix):
                target = walk.layout.targets.get(name.removesuffix(".weight"))
                if target is None or target.kind == "dense":
                    tensors[name.removeprefix(prefix)] = self.blocks.turn(name, self.writer.read(name))
                else:
                    tensors[name.removeprefix(prefix)] = dense(walk.layout.packed(target, self.writer.read))
        return self.blocks.compute(index, tensors)

    def _block(self, index: int) -> tuple[float, float]:
        walk = self.walk
        block = self.split(index)
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
        if self.dense is not None:
            self.dense = self._outputs(index, self.blocks.compute(index, self.blocks.tensors(block)), self.dense)
            result = self._recovered(block, result)
        del params
        if self.propagate and index + 1 < len(self.blocks):  # nobody reads the last block's outputs
            self._advance(index, self.blocks.compute(index, self._as_stored(block, result)))
        return result

    def _recovered(self, block: Block, result: Result) -> Result:
        """The result with its values trained until the block gives what the dense one gave."""
        walk, index = self.walk, block.index
        assert self.states is not None
        assert self.dense is not None
        linears = {n: registry.by_kind(p.kind).trainable(p) for n, p in result.packed.items()}
        fixed = self.blocks.compute(index, self._as_stored(block, result))

        def run(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return walk.skeleton.run(index, fixed | self.blocks.params(index, {f"{n}.weight": W for n, W in weights.items()}), x)

        recovery = Recovery(run, self.states, self.dense, walk.device)
        parts, losses = recovery.train(linears, walk.config.recover, walk.config.recover_lr, index)
        packed = {n: one.rebuild(parts[n]) for n, one in linears.items()}
        errors = {n: relative_error(block.weights[n].float(), dense(p)) for n, p in packed.items()}
        return replace(result, packed=packed, errors=errors, record={**result.record, "recovery": losses})

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
        walk = self.walk

        def answer(stats: Mapping[str, InputStats], run: Runner) -> Result:
            return walk.method.compress(block, stats, walk.config, run, walk.layout.scale_dtype)  # type: ignore[no-any-return]

        return self.observe(block, params, walk.method.collects(block, walk.config), answer)

    @staticmethod
    def _linears(block: Block, result: Result) -> Tensors:
        return {f"{n}.weight": dense(result.packed[n]) for n in block.weights}

    def _as_stored(self, block: Block, result: Result) -> Tensors:
        """A compressed block's tensors with the rounding that the artifact gives them: what a resumed run reads back."""
        prefix, plan = self.walk.skeleton.prefix(block.index), self.writer.plan
        tensors = {**block.tensors, **result.tensors, **self._linears(block, result)}
        return {n: t.to(dtypes.TORCH[plan[prefix + n].dtype]) if prefix + n in plan else t for n, t in tensors.items()}

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, block: Block, result: Result) -> tuple[float, float]:
        """Write a block's compressed linears and its other tensors; returns (bits per weight, mean error)."""
        walk, prefix = self.walk, self.walk.skeleton.prefix(block.index)
        assert result.packed.keys() == block.weights.keys(), "a method must pack exactly the linears that it was given"
        assert result.tensors.keys() <= block.tensors.keys(), "a method may only change tensors that exist"
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
                "kind": target.kind, "version": registry.by_kind(target.kind).VERSION, "params": dict(target.params),
                "shape": list(target.shape), "bits": float(f"{bits / size:.6g}"), "error": float(f"{result.errors[name]:.6g}"),
                **self._zeros(block, name, target.name, packed),
            }  # fmt: skip
        for name in block.tensors:
            tensor = self.blocks.turn(prefix + name, result.tensors.get(name, block.tensors[name]))
            self._write_dense(prefix + name, tensor)
        if result.record:
            self.work.state["search"].append({"block": block.index, **result.record})
        return stored / weights if weights else 0.0, sum(result.errors.values()) / max(1, len(result.errors))

    def _zeros(self, block: Block, name: str, target: str, packed: Packed) -> dict[str, Any]:
        """Density and mask of a linear whose zeros are meant, for the manifest; a quantized one keeps its source's mask."""
        if not (self.walk.sparse or name in block.sparse):
            return {}
        W = registry.pruned(packed)
        kept = (W if self.walk.sparse else block.weights[name]) != 0  # a pruning method chooses a mask anew
        lost = int(((W != 0) & ~kept.to(W.device)).sum())
        if lost:
            why = f"{target}: {lost} pruned weights came back"
            raise CompressError(why, hint="this method cannot keep zeros: use gptq, rtn or awq")
        digest = hashlib.sha256(np.packbits(kept.cpu().numpy(), bitorder="little").tobytes()).hexdigest()
        return {"density": float(f"{int(W.count_nonzero()) / W.numel():.6g}"), "mask_sha256": digest}

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
        """Copy everything that is in no block, piece by piece; embedding and head are rounded where that was asked for."""
        walk = self.walk
        prefixes = tuple(walk.skeleton.prefix(i) for i in range(len(walk.skeleton.blocks)))
        for name in walk.view.names:
            if name.startswith(prefixes):
                continue
            head = walk.layout.heads.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if head is not None:
                self.work.state["heads"][head.name] = heads.write(walk.view, self.writer, head, walk.device)
                continue
            start = 0
            for piece in walk.view.chunks(name):
                self.writer.write_piece(name, start, self._cast(name, piece, self.writer.plan[name].dtype))
                start += piece.numel()

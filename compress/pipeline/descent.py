"""Training with one block in memory, for a method that looks at gradients on the way: LOMO (arXiv 2306.09782) in streamed form.

    W <- W - lr min(1, clip / |g'|) g'        |g'| over all tensors of all blocks

A step is a forward pass, loss and gradient at the head, and one backward pass, last block to first; `Learner` sees every linear's
gradient and may change it. LOMO runs a second backward pass because the clip needs the norm of all gradients before the first
weight may move. Here g' lies on disk beside W, and the next step's walk subtracts it as it reads the block: the same numbers.

A file per block holds W and g' (fp32), the step that they are of, and the learner's sums. It is replaced atomically, so each
is a resume point: blocks that a killed step had reached give their gradients again, and only the input gradient is recomputed. All
tensors of the blocks are trained; embedding, last norm and head are not. The weights are thrown away in the end.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.checkpoint.reader import read_json
from compress.checkpoint.writer import write_json
from compress.errors import CompressError
from compress.models.head import Head
from compress.pipeline import memory
from compress.pipeline.blocks import Blocks, Tensors
from compress.pipeline.layout import Layout
from compress.pipeline.resume import Kept
from compress.pipeline.reverse import at_head, finite
from compress.pipeline.states import Store
from compress.types import Block, Learner, Progress, Schedule

logger = logging.getLogger(__name__)
_WEIGHT, _GRADIENT, _LEARNT = "W:", "g:", "learnt:"  # prefixes in a block's file
_DIVERGES = "the training diverges: a smaller --lr"
_TINY = 1e-6  # beside the norm that the clip divides by (`lomo.py`)


@dataclass(frozen=True)
class Descent:
    """One training; nothing in it changes while it runs. Results lie in `folder`, a file per block, as those of `Reverse`."""

    blocks: Blocks
    layout: Layout
    tokens: torch.Tensor  # (N, T)
    schedule: Schedule
    learner: Callable[[Block, Mapping[str, torch.Tensor]], Learner]  # of a block and the state it starts from
    folder: Path
    states: Path | None  # folder for a step's inputs; None: in RAM
    job: str = ""
    progress: Callable[[Progress], None] | None = None
    surveyed: Callable[[int], Tensors] | None = None

    @property
    def _results(self) -> Kept:
        return Kept(self.folder, self.job)

    @property
    def _steps(self) -> Kept:
        return Kept(self.folder / "steps", self.job)

    @property
    def steps(self) -> int:
        """How many there are."""
        return self.schedule.epochs * -(-len(self.tokens) // self.schedule.batch)

    def result(self, index: int) -> Tensors:
        """What the learners kept of a block."""
        return self._results.read(index)

    @torch.no_grad()
    def run(self) -> None:
        """Train from the resume point on, and write every block's result."""
        self._results.open()
        if all(self._results.has(i) for i in range(len(self.blocks))):
            return
        self._steps.open()
        head = Head(self.blocks.skeleton, self.blocks.view, self.blocks.dtype)
        done, began = self._known()[0], time.monotonic()
        if done:
            logger.info("resuming the training at step %d of %d", done + 1, self.steps)
        for step in range(done + 1, self.steps + 1):
            start = time.monotonic()
            self._step(step, head)
            now = time.monotonic()
            if self.progress is not None:
                left = (now - began) / (step - done) * (self.steps - step)
                self.progress(Progress(step - 1, self.steps, now - start, left, memory.rss(), what="training"))
        for index in range(len(self.blocks)):
            if not self._results.has(index):
                block = self._split(index, self.blocks.load(index))  # the original weights
                self._results.write(index, self.learner(block, self._learnt(index)).result())
        shutil.rmtree(self._steps.folder, ignore_errors=True)

    # -- what lies on disk --------------------------------------------------------------------------------------------

    def _known(self) -> tuple[int, float]:
        """The last whole step, and the factor that its gradients are to be subtracted with; (0, 0) before the first."""
        path = self._steps.folder / "done.json"
        found = read_json(path) if path.exists() else {}
        return (int(found["step"]), float(found["factor"])) if found.get("job") == self.job else (0, 0.0)

    def _reached(self, index: int) -> int:
        """The step that a block's file is of; 0 where there is none."""
        return int(self._steps.read(index, lambda name: name == "step")["step"]) if self._steps.has(index) else 0

    def _learnt(self, index: int) -> Tensors:
        if not self._steps.has(index):
            return {}
        found = self._steps.read(index, lambda name: name.startswith(_LEARNT))
        return {name.removeprefix(_LEARNT): t.to(self.blocks.device) for name, t in found.items()}

    def _weights(self, index: int, step: int) -> Tensors:
        """A block's tensors before `step`, those that are trained in fp32 at least."""
        wide = torch.promote_types(self.blocks.dtype, torch.float32)
        reached, (done, factor) = self._reached(index), self._known()
        if not reached:
            return {n: t.to(wide) if t.is_floating_point() else t for n, t in self.blocks.load(index).items()}
        read = self._steps.read(index, lambda name: name.startswith((_WEIGHT, _GRADIENT)))
        found = {name: t.to(self.blocks.device) for name, t in read.items()}
        W = {n.removeprefix(_WEIGHT): t for n, t in found.items() if n.startswith(_WEIGHT)}
        if reached == step:  # a killed run had come so far
            return W
        assert reached == done == step - 1
        for name, t in W.items():
            g = found.get(_GRADIENT + name)
            if g is not None:
                t.sub_(g, alpha=factor)
        return W

    def _split(self, index: int, loaded: Tensors) -> Block:
        block = self.blocks.split(index, loaded, self.layout)
        return block if self.surveyed is None else replace(block, survey=self.surveyed(index))

    # -- one step -----------------------------------------------------------------------------------------------------

    def _windows(self, step: int) -> torch.Tensor:
        """The windows of a step; every epoch has an order of its own."""
        each = self.steps // self.schedule.epochs
        epoch, number = divmod(step - 1, each)
        order = torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(epoch))
        return self.tokens[order[number * self.schedule.batch : (number + 1) * self.schedule.batch]]

    def _step(self, step: int, head: Head) -> None:
        tokens, blocks = self._windows(step), self.blocks
        inputs = self._forward(tokens, step)
        try:
            upstream = at_head(blocks, tokens, self.states, head, inputs[-1])
        except CompressError as error:
            if step == 1:
                raise
            raise CompressError(f"step {step}: {error.message}", hint=_DIVERGES) from error
        total = 0.0
        for index in range(len(blocks) - 1, -1, -1):
            upstream, square = self._block(index, step, inputs[index], upstream)
            total += square
            memory.trim()
        upstream.close()
        schedule = self.schedule
        clip = min(1.0, schedule.clip / (total**0.5 + _TINY)) if schedule.clip else 1.0
        factor = schedule.rate(step, self.steps) * clip
        write_json(self._steps.folder / "done.json", {"job": self.job, "step": step, "factor": factor})

    def _forward(self, tokens: torch.Tensor, step: int) -> list[Store]:
        """Every block's inputs, and last the last block's outputs; one (1, T, D) tensor per window."""
        blocks = self.blocks
        kept = [Store(self.states)]
        for x in blocks.skeleton.embed(blocks.view, tokens, 1, blocks.device, blocks.dtype):
            kept[0].append(x)
        for index in range(len(blocks)):
            params = blocks.compute(index, self._weights(index, step))
            kept.append(Store(self.states))
            for n in range(len(tokens)):
                out = blocks.skeleton.run(index, params, kept[index][n].to(blocks.device))
                self._check(out, index, step, "its output")
                kept[-1].append(out)
            del params
            memory.trim()
        return kept

    def _block(self, index: int, step: int, inputs: Store, upstream: Store) -> tuple[Store, float]:
        """dL/dinput of a block for every window, and the squared norm of its gradients; closes `inputs` and `upstream`."""
        W, known = self._weights(index, step), self._reached(index) == step
        params = self.blocks.compute(index, W)
        trained = [] if known else [n for n, _ in self.blocks.skeleton.blocks[index].named_parameters()]
        grads: Tensors = {}
        out = Store(self.states)
        for n in range(len(upstream)):
            dx, found = self._backward(index, params, trained, inputs[n], upstream[n])
            for name, g in found.items():
                grads[name] = grads[name].add_(g) if name in grads else g
            self._check(dx, index, step, "the gradient of its input")
            out.append(dx)
        count = len(upstream)
        inputs.close()
        upstream.close()
        if known:
            return out, float(self._steps.read(index, lambda name: name == "square")["square"])
        return out, self._learn(index, step, W, {name: g.div_(count) for name, g in grads.items()})

    def _learn(self, index: int, step: int, W: Tensors, grads: Tensors) -> float:
        """Hand a block's mean gradients to its learner and write the block's file; the squared norm of what it returned."""
        block = self._split(index, dict(W))
        learner, rate = self.learner(block, self._learnt(index)), self.schedule.rate(step, self.steps)
        for linear in block.weights:
            name = f"{linear}.weight"
            if name in grads:
                grads[name] = learner.learn(linear, grads[name], rate)
        square = sum(float(g.square().sum(dtype=torch.float64)) for g in grads.values())
        if not square < float("inf"):
            raise CompressError(f"block {index}: the gradient of step {step} is NaN or Inf", hint=_DIVERGES)
        self._steps.write(index, {
            **{_WEIGHT + n: t for n, t in W.items()}, **{_GRADIENT + n: g for n, g in grads.items()},
            **{_LEARNT + n: t for n, t in learner.state().items()},
            "step": torch.tensor(step), "square": torch.tensor(square, dtype=torch.float64),
        })  # fmt: skip
        return square

    def _backward(
        self, index: int, params: Tensors, trained: list[str], x: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, Tensors]:  # fmt: skip
        """(dL/dx, the gradients of the `trained` parameters as methods see them) of one window."""
        blocks, prefix = self.blocks, self.blocks.skeleton.prefix(index)
        x, dy = x.to(blocks.device).detach().requires_grad_(), dy.to(blocks.device)
        leaves = {n: params[n].detach().requires_grad_() for n in trained}
        with torch.enable_grad():
            out = blocks.skeleton.run(index, {**params, **leaves}, x)
            dx, *grads = torch.autograd.grad(out, [x, *leaves.values()], dy, allow_unused=True)
        wide = torch.promote_types(blocks.dtype, torch.float32)
        found = {n: blocks.turn(prefix + n, g).to(wide) for n, g in zip(leaves, grads, strict=True) if g is not None}
        return dx, found

    def _check(self, tensor: torch.Tensor, index: int, step: int, what: str) -> None:
        if step == 1:
            finite(tensor, f"block {index}: {what}")
        elif not torch.isfinite(tensor).all():
            raise CompressError(f"block {index}: {what} is NaN or Inf in step {step}", hint=_DIVERGES)

"""The walks of one job, in their order, and what they keep on disk meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from compress import calibration
from compress.checkpoint.writer import CheckpointWriter
from compress.job import Asked, Job
from compress.pipeline.blocks import Blocks
from compress.pipeline.choices import decide, reducers
from compress.pipeline.descent import Descent
from compress.pipeline.estimate import on_disk
from compress.pipeline.forward import Forward
from compress.pipeline.resume import WorkDir
from compress.pipeline.reverse import Reverse
from compress.pipeline.survey import Survey
from compress.pipeline.walk import Walk
from compress.types import Block, Learner


class Run:
    """The walks of one job: a survey and a reverse walk where the method asks for them, then the one that compresses."""

    def __init__(self, job: Job, ask: Asked, work: WorkDir, tokens: torch.Tensor | None, domain: torch.Tensor | None) -> None:
        self.job, self.ask, self.work = job, ask, work
        self.tokens, self.domain = tokens, domain
        self.survey: Survey | None = None
        self.reverse: Reverse | Descent | None = None

    def all(self) -> None:
        """Every walk, in order."""
        if self.job.surveys:
            tokens = self.tokens if self.job.survey_observes else None
            self.survey = Survey(self._walk(tokens), self.work.path / "survey", self.work.job)
            self.survey.run()
        self._gradients()
        job, work = self.job, self.work
        writer = CheckpointWriter(work.artifact, job.layout.plan, job.max_shard)
        writer.open(fresh=work.done == 0)
        tokens = self.tokens if job.observes else None
        Forward(self._walk(None if tokens is None else calibration.expand(tokens, job.expand)), writer, work).run()
        writer.finish()

    @property
    def spooled(self) -> int:
        """Bytes that the walks keep in the work folder, beside the artifact, until the run is over."""
        job, linears = self.job, self.job.layout.targets.values()
        own = getattr(job.method, "spool", None)
        total = own(job.config, sum(t.shape[0] * t.shape[1] for t in linears), len(linears)) if own is not None else 0
        each, states = self._width * job.dtype.itemsize, [0]
        if self.tokens is not None and on_disk(self.ask.states, self.tokens.numel(), self._width, job.dtype):
            states.append(self.tokens.numel() * job.expand * each * (4 if getattr(job.config, "recover", 0) else 2))
        tokens, blocks = self._examples, len(job.skeleton.blocks)
        if tokens is not None and on_disk(self.ask.states, tokens.numel() * (blocks + 1) // 3, self._width, job.dtype):
            windows = len(tokens) if job.schedule is None else job.schedule.batch
            states.append(windows * tokens.shape[1] * each * (blocks + 3))
        return int(total) + max(states)

    @property
    def _examples(self) -> torch.Tensor | None:
        """The windows that gradients are taken from, where they are needed."""
        tokens = self.domain if self.domain is not None else self.tokens
        needed = tokens is not None and reducers(self.job.method, self.job.config, self.job.layout, self.job.widths)
        return tokens[: self.job.samples] if needed and tokens is not None else None

    def _walk(self, tokens: torch.Tensor | None) -> Walk:
        job = self.job
        disk = on_disk(self.ask.states, tokens.numel() if tokens is not None else 0, self._width, job.dtype)
        return Walk(
            job.skeleton, job.view, job.layout, job.method, job.config, tokens, job.batch_size, job.device, job.dtype,
            self.work.path if disk else None, self.ask.progress,
            None if self.reverse is None else self.reverse.result, None if self.survey is None else self.survey.result,
        )  # fmt: skip

    @property
    def _width(self) -> int:
        return int(self.job.skeleton.config.get_text_config().hidden_size)

    def _gradients(self) -> None:
        """The reverse walk, where the method or the widths ask for gradients, and the layout that follows from it."""
        job, work = self.job, self.work
        makers = reducers(job.method, job.config, job.layout, job.widths)
        if makers:
            tokens = self._examples
            assert tokens is not None
            blocks = Blocks(job.skeleton, job.view, job.device, job.dtype)
            kept = tokens.numel() * (len(blocks) + 1) // 3  # `on_disk` counts three copies
            disk = on_disk(self.ask.states, kept, self._width, job.dtype)
            folder, states = work.path / "reverse", work.path if disk else None
            rest = work.job, self.ask.progress, None if self.survey is None else self.survey.result
            if job.schedule is not None:
                learner = functools.partial(_learner, job)
                self.reverse = Descent(blocks, job.layout, tokens, job.schedule, learner, folder, states, *rest)
            else:
                self.reverse = Reverse(blocks, job.layout, tokens, makers, folder, states, *rest)
            self.reverse.run()
        if makers or self.survey is not None:
            prefixes = [job.skeleton.prefix(i) for i in range(len(job.skeleton.blocks))]
            self.job = job.planned(decide(job.layout, prefixes, job.method, job.config, job.widths, self._kept))

    def _kept(self, index: int) -> dict[str, torch.Tensor]:
        """What the earlier walks kept of a block."""
        walks = (self.survey, self.reverse)
        return {name: t for walk in walks if walk is not None for name, t in walk.result(index).items()}


def _learner(job: Job, block: Block, state: Mapping[str, torch.Tensor]) -> Learner:
    """What the method makes of a block's gradients in one step of its training."""
    found: Learner = job.method.learner(block, job.config, state)
    return found

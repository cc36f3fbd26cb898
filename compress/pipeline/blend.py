"""The walk of `merge`: base and fine-tunes in step; each tensor is theta_0 + alpha merged(tau), rounded once and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.checkpoint import dtypes
from compress.checkpoint.writer import CheckpointWriter, Planned
from compress.pipeline import memory, tensors
from compress.pipeline.planes import STEP
from compress.pipeline.resume import WorkDir
from compress.pipeline.tensors import Item, Source, Trim
from compress.types import Progress


@dataclass
class Blend:
    """One merge; `lambdas` are in the order of the fine-tunes."""

    base: Source
    tunes: Sequence[Source]
    items: Sequence[Item]
    method: Any  # a module of `methods`
    config: Any
    device: str
    trim: Trim | None = None

    def plan(self) -> list[Planned]:
        """The base's tensors, as they will be written."""
        return [Planned(i.name, self.base.view.dtype(i.name), i.shape) for i in self.items if i.shape is not None]

    def pieces(self, item: Item, lambdas: Sequence[float], alpha: float) -> Iterator[torch.Tensor]:
        """One merged tensor in flat pieces of the base's dtype."""
        dtype = dtypes.TORCH[self.base.view.dtype(item.name)]
        if not item.masked:
            yield from self.base.view.chunks(item.name)
            return
        tunes = [t for t in self.tunes if t.name in item.masked]
        order = [t.name for t in self.tunes]
        chosen = [order.index(t.name) for t in tunes]
        trim = None if self.trim is None else ([self.trim[0][i] for i in chosen], self.trim[1])
        own = [lambdas[i] for i in chosen] if lambdas else []
        for W0, tau in tensors.pieces(self.base, tunes, item, self.device):
            merged = self.method.merged(tau, own, self.config, trim)
            yield W0.add_(merged, alpha=alpha).to(dtype).cpu().flatten()

    def counts(self, item: Item, lambdas: Sequence[float]) -> list[int]:
        """How many weights 0, 1, … T masks keep; empty where the method has no masks."""
        if not self.config.masked or len(item.masked) != len(self.tunes):
            return []
        from compress.methods import _merging

        total = torch.zeros(len(self.tunes) + 1, dtype=torch.int64)
        for _, tau in tensors.pieces(self.base, self.tunes, item, self.device):
            found = _merging.counts(tau, _merging.total(tau, self.trim), lambdas)
            total += torch.bincount(found.flatten().to(torch.int64), minlength=len(total)).cpu()
        return [int(n) for n in total]

    def write(
        self, work: WorkDir, lambdas: Sequence[float], alpha: float, max_shard: int, progress: Callable[[Progress], None] | None
    ) -> None:  # fmt: skip
        """Write all tensors; every few millions of weights are a resume point."""
        writer = CheckpointWriter(work.artifact, self.plan(), max_shard)
        writer.open(fresh=work.done == 0)
        histogram = work.state.setdefault("counts", {})
        wanted = [i for i in self.items if i.shape is not None]
        began, first, since = time.monotonic(), work.done, 0
        for index, item in enumerate(wanted):
            if index < first:
                continue
            start, then = 0, time.monotonic()
            for piece in self.pieces(item, lambdas, alpha):
                writer.write_piece(item.name, start, piece)
                start += len(piece)
            counts = self.counts(item, lambdas)
            if counts:
                histogram[item.name] = counts
            since += max(item.size, 1)
            if since >= STEP or index + 1 == len(wanted):
                writer.flush()
                work.commit(index + 1)
                memory.release()
                since = 0
            if progress is not None:
                done, todo = (sum(i.size for i in part) for part in (wanted[first : index + 1], wanted[index + 1 :]))
                left = todo * (time.monotonic() - began) / max(done, 1)
                rss = memory.rss()
                progress(Progress(index, len(wanted), time.monotonic() - then, left, rss, None, None, item.name))
        writer.finish()

    def fill(self, model: torch.nn.Module, lambdas: Sequence[float], alpha: float) -> None:
        """Overwrite a live model's parameters with the merged ones."""
        found = dict(model.named_parameters())
        with torch.no_grad():
            for item in self.items:
                if item.masked and item.name in found:
                    flat, start = found[item.name].data.view(-1), 0
                    for piece in self.pieces(item, lambdas, alpha):
                        flat[start : start + len(piece)].copy_(piece)
                        start += len(piece)

    def masked(self, model: torch.nn.Module, index: int, lam: float) -> None:
        """Overwrite a live model's parameters with one task's masked ones: theta_0 + m_t v, by which its lambda is judged."""
        from compress.methods import _merging, _taskmask

        found = dict(model.named_parameters())
        with torch.no_grad():
            for item in self.items:
                if len(item.masked) == len(self.tunes) and item.name in found:
                    flat, start = found[item.name].data.view(-1), 0
                    dtype = dtypes.TORCH[self.base.view.dtype(item.name)]
                    for W0, tau in tensors.pieces(self.base, self.tunes, item, self.device):
                        v = _merging.total(tau, self.trim)
                        piece = W0.add_(v * _taskmask.tall(tau[index], v, lam)).to(dtype).flatten()
                        flat[start : start + len(piece)].copy_(piece)
                        start += len(piece)

"""The walk of `bundle`: base and fine-tunes in step, every tensor a resume point; a shared vector, bits, factors, errors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from compress.checkpoint import bundled
from compress.checkpoint.dtypes import finite
from compress.checkpoint.reader import matrix
from compress.errors import CompressError
from compress.formats import masked_delta
from compress.methods import _taskmask
from compress.methods._taskmask import Stored, Sums
from compress.pipeline import memory, tensors
from compress.pipeline.resume import WorkDir
from compress.pipeline.spool import Spool
from compress.pipeline.tensors import Item, Source, Trim
from compress.types import Progress

SHARED, LOW = "shared", "low"
STEP = 8 << 20  # weights between two resume points: syncing after every norm would take longer than the work


def stream(task: str) -> str:
    """Name of a task's spool."""
    return f"task-{task}"


@dataclass
class Walk:
    """Everything that the walk needs; `lambdas` are the tasks' own."""

    base: Source
    tunes: Sequence[Source]
    items: Sequence[Item]
    method: ModuleType
    config: Any
    lambdas: Mapping[str, float]
    device: str
    work: WorkDir
    progress: Callable[[Progress], None] | None = None
    trim: Trim | None = None

    def run(self) -> Spool:
        """Spool all tensors; returns the spool, whole."""
        state = self.work.state
        for key in ("spool", "records", "sums", "shapes"):
            state.setdefault(key, {})
        spool = Spool(self.work.path / "spool", state["spool"])
        if self.config.trims and "trim" not in state:
            state["trim"] = tensors.thresholds(self.base, self.tunes, self.items, self.config.density, self.device)
            self.work.commit(0)
        if self.config.trims:
            self.trim = state["trim"]
        began, first, since = time.monotonic(), self.work.done, 0
        for index, item in enumerate(self.items):
            if index < first:
                continue
            start = time.monotonic()
            error = self._masked(item, spool) if item.masked else None
            self._whole(item, spool)
            since += max(item.size, 1)
            if since >= STEP or index + 1 == len(self.items):
                spool.flush()
                self.work.commit(index + 1)
                memory.release()
                since = 0
            self._say(item, index, first, time.monotonic() - start, began, error)
        if self.work.done == len(self.items):
            self._factors(spool)
            spool.flush()
            self.work.commit(len(self.items) + 1)
        return spool

    def _say(self, item: Item, index: int, first: int, seconds: float, began: float, error: float | None) -> None:
        self.work.log({"tensor": item.name, "seconds": round(seconds, 3), "error": error})
        if self.progress is not None:
            done = sum(i.size for i in self.items[first : index + 1])
            left = sum(i.size for i in self.items[index + 1 :]) * (time.monotonic() - began) / max(done, 1)
            self.progress(Progress(index, len(self.items), seconds, left, memory.rss(), error, None, item.name))

    # -- tensors with deltas -----------------------------------------------------------------------------------------------

    def _masked(self, item: Item, spool: Spool) -> float | None:
        """One tensor with deltas; the mean relative error, None where no fine-tune changed it."""
        assert item.shape is not None
        tunes = [t for t in self.tunes if t.name in item.masked]
        sums: Sums | None = None
        for _, tau in tensors.pieces(self.base, tunes, item, self.device):
            part = _taskmask.moments(tau)
            sums = part if sums is None else sums + part
        assert sums is not None
        touched = [i for i, t2 in enumerate(sums.tau2) if t2 > 0]
        for i, tune in enumerate(tunes):
            self._note(tune, item, bundled.MASKED if i in touched else bundled.BASE, spool)
        if not touched:
            return None
        moments = Sums(sums.count, tuple(sums.tau1[i] for i in touched), tuple(sums.tau2[i] for i in touched))
        moved = [tunes[i] for i in touched]
        full, planes = self._bits(item, moved, moments, spool)
        for tune, plane in zip(moved, planes, strict=True):
            coded = masked_delta.deflate(plane)
            suffix = "mask" if coded is None else "mask_deflate"
            spool.put(stream(tune.name), f"{item.name}.{suffix}", plane if coded is None else coded)
        self.work.state["shapes"][item.name] = {
            "shape": list(item.shape), "group_size": _taskmask.group_size(self.config.shared, item.shape[-1])
        }  # fmt: skip
        self._keep(item, moved, full)
        scales = self.method.scales([full], self.config)[0]
        return sum(full.errors(scales)) / len(moved)

    def _bits(self, item: Item, moved: list[Source], moments: Sums, spool: Spool) -> tuple[Sums, list[torch.Tensor]]:
        """Spool the shared vector of one tensor; returns the sums and each task's words (O, K)."""
        assert item.shape is not None
        rows, columns = matrix(item.shape)
        factors = self.method.provisional(moments, self.config)
        planes = [torch.empty(rows, masked_delta.words(columns), dtype=torch.int32) for _ in moved]
        trim = None if self.trim is None else (self._of(self.trim[0], moved), self.trim[1])
        full: Sums | None = None
        writer = _SharedWriter(spool, item, self.config)
        start = 0
        for _, tau in tensors.pieces(self.base, moved, item, self.device):
            v = writer.add(self.method.shared(tau, moments, self.config, trim))
            bits, d = [], []
            for t, factor, tune, plane in zip(tau, factors, moved, planes, strict=True):
                found = self.method.bits(t, v, factor, self.lambdas.get(tune.name, 1.0), self.config)
                plane[start : start + len(t)] = masked_delta.pack_mask(found.cpu())
                bits.append(found)
                d.append(_taskmask.apply(found, v, self.config.are_signs))
            part = _taskmask.products(list(tau), d, bits)
            full = part if full is None else full + part
            start += tau.shape[1]
        writer.close()
        assert full is not None
        return full, planes

    def _of(self, values: Sequence[float], moved: list[Source]) -> list[float]:
        """The values of some of the fine-tunes."""
        order = [t.name for t in self.tunes]
        return [values[order.index(t.name)] for t in moved]

    def _keep(self, item: Item, moved: list[Source], full: Sums) -> None:
        """Remember a tensor's sums, for all tasks: zeros where it has not changed."""
        order = {t.name: i for i, t in enumerate(moved)}
        row: dict[str, Any] = {"count": full.count}
        for key in ("tau1", "tau2", "dot", "d1", "d2", "ones"):
            values = getattr(full, key)
            row[key] = [values[order[t.name]] if t.name in order else 0 for t in self.tunes]
        self.work.state["sums"][item.name] = row

    def _note(self, tune: Source, item: Item, how: str, spool: Spool) -> None:
        """Record how a task has a tensor, and spool the rows that the base has not."""
        own = tune.view.shape(item.name)
        record: dict[str, Any] = {"dtype": tune.view.dtype(item.name), "shape": list(own), "how": how}
        if item.shape is not None and own != item.shape:
            record |= {"how": bundled.MASKED, "rows": own[0] - item.shape[0]}
            self.work.state["shapes"].setdefault(
                item.name,
                {"shape": list(item.shape), "group_size": _taskmask.group_size(self.config.shared, item.shape[-1])},
            )
            base_rows = matrix(item.shape)[0]
            tail = tune.view.read_slice(item.name, base_rows, matrix(own)[0])
            spool.put(stream(tune.name), f"{item.name}.rows", tail)
        self.work.state["records"].setdefault(tune.name, {})[item.name] = record

    # -- tensors in full ---------------------------------------------------------------------------------------------------

    def _whole(self, item: Item, spool: Spool) -> None:
        for tune in self.tunes:
            if tune.name not in item.whole:
                continue
            same = item.shape is not None and tensors.equal_to_base(self.base, tune, item.name)
            record = {"dtype": tune.view.dtype(item.name), "shape": list(tune.view.shape(item.name))}
            record["how"] = bundled.BASE if same else bundled.WHOLE
            self.work.state["records"].setdefault(tune.name, {})[item.name] = record
            if not same:
                spool.begin(stream(tune.name), item.name, tune.view.dtype(item.name), tune.view.shape(item.name))
                for piece in tune.view.chunks(item.name):
                    spool.append(stream(tune.name), piece)

    # -- at the end --------------------------------------------------------------------------------------------------------

    def sums(self) -> dict[str, Sums]:
        """What is known of every tensor that some fine-tune changed, in the order of the walk: a resume point has another."""
        known, keys = self.work.state["sums"], ("tau1", "tau2", "dot", "d1", "d2", "ones")
        rows = {i.name: known[i.name] for i in self.items if i.name in known}
        return {name: Sums(row["count"], *(tuple(row[key]) for key in keys)) for name, row in rows.items()}

    def scales(self) -> dict[str, list[float]]:
        """s of every such tensor and task."""
        found = self.sums()
        return dict(zip(found, self.method.scales(list(found.values()), self.config), strict=True))

    def _factors(self, spool: Spool) -> None:
        for name, row in self.scales().items():
            for tune, s, t2 in zip(self.tunes, row, self.sums()[name].tau2, strict=True):
                if t2 > 0:
                    spool.put(stream(tune.name), f"{name}.scale", torch.tensor([s], dtype=torch.float64).to(torch.float16))

    def report(self) -> dict[str, dict[str, Any]]:
        """Per task: lambda, relative error of all its deltas and of each tensor, factor, share of bits that are set."""
        scales, out = self.scales(), {}
        found = self.sums()
        for i, tune in enumerate(self.tunes):
            rows, lost, total = {}, 0.0, 0.0
            for name, s in found.items():
                if s.tau2[i] > 0:
                    error = s.errors(scales[name])[i]
                    rows[name] = {"error": error, "scale": scales[name][i], "density": s.ones[i] / s.count}
                    lost, total = lost + error * s.tau2[i], total + s.tau2[i]
            out[tune.name] = {
                "lambda": self.lambdas.get(tune.name), "error": lost / total if total else 0.0, "norm": total**0.5, "tensors": rows
            }  # fmt: skip
        return out


class _SharedWriter:
    """Spools one tensor's shared vector as its rows come."""

    def __init__(self, spool: Spool, item: Item, config: Any, stream: str = SHARED) -> None:
        self.spool, self.item, self.config, self.stream = spool, item, config, stream
        self.low: _SharedWriter | None = None
        self.scales: list[torch.Tensor] = []
        self.begun = False

    def add(self, v: torch.Tensor) -> torch.Tensor:
        """Store rows (R, C), or the single number (1,), or of two vectors (2, R, C), and return what will be read back."""
        if v.dim() == 3:
            if self.low is None:
                self.low = _SharedWriter(self.spool, self.item, self.config, LOW)
            return torch.stack([self.low.add(v[0]), self.add(v[1])])
        if not finite(v):
            raise CompressError(f"{self.item.name}: the shared vector holds NaN or Inf", hint="report this with --debug")
        name = self.item.name
        if self.config.shared == _taskmask.CONSTANT:
            if not self.begun:
                self.spool.put(self.stream, f"{name}.shared", v)
            self.begun = True
            return v
        kept = _taskmask.store(v, self.config.shared, not self.config.are_signs)
        suffix, rows = self._rows(kept)
        if not self.begun:
            whole = matrix(self.item.shape or ())[0]
            dtype = "BF16" if kept.values is not None else "I32"
            self.spool.begin(self.stream, f"{name}.{suffix}", dtype, (whole, rows.shape[1]))
            self.begun = True
        self.spool.append(self.stream, rows)
        if kept.scale is not None:
            self.scales.append(kept.scale.cpu())
        return kept.v

    def _rows(self, kept: Stored) -> tuple[str, torch.Tensor]:
        if kept.values is not None:
            return "shared", kept.values
        assert kept.codes is not None
        return "shared_packed", masked_delta.pack_codes(kept.codes.cpu(), masked_delta.width(self.config.shared))

    def close(self) -> None:
        """The scales, once all rows are there."""
        if self.low is not None:
            self.low.close()
        if self.scales:
            self.spool.put(self.stream, f"{self.item.name}.shared_scale", torch.cat(self.scales))


def settings(config: Any) -> dict[str, Any]:
    """A config's fields, for manifest and fingerprint."""
    return dict(dataclasses.asdict(config))

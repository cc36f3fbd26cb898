"""Layers of a model that runs several tasks in one batch: the base's weight once, and what each row's task changes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from compress_kernels import masked_delta as kernel
from torch import nn

from compress.errors import CompressError

Tensors = Mapping[str, torch.Tensor]


class Rows:
    """Which task each row of a batch is of; shared by the layers of one model."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks
        self.names: tuple[str | None, ...] | None = None

    def groups(self, count: int) -> dict[str | None, list[int]]:
        """Rows of each task among `count`; every task's row may have become an equal run of rows (beams, flattened tokens)."""
        if self.names is None:
            hint = f"model.set_tasks([…]) or generate(tasks=[…]); tasks: {', '.join(self.tasks)}"
            raise CompressError("no task was chosen for the rows of the batch", hint=hint, usage=True)
        if len(self.names) == 1:
            return {self.names[0]: list(range(count))}
        if count % len(self.names):
            hint = "name one task per row"
            raise CompressError(f"{len(self.names)} tasks for a batch of {count} rows", hint=hint, usage=True)
        return kernel.groups(self.names, count)

    def spread(self, count: int) -> list[str | None]:
        """The task of every one of `count` rows."""
        out: list[str | None] = [None] * count
        for task, rows in self.groups(count).items():
            for row in rows:
                out[row] = task
        return out


class PerTask(nn.Module):
    """A module whose parameters differ from task to task, kept in full: norms, biases, whatever has no bits."""

    def __init__(self, module: nn.Module, own: Mapping[str, Tensors], rows: Rows) -> None:
        super().__init__()
        self.module, self.rows = module, rows
        self.own = _Kept({t: dict(tensors) for t, tensors in own.items()})

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (B, …) through the module, each row with its task's parameters."""
        groups = self.rows.groups(len(x))
        if len(groups) == 1:
            return self._run(next(iter(groups)), x, args, kwargs)
        out: torch.Tensor | None = None
        for task, rows in groups.items():
            mine = functools.partial(_pick, rows=rows, count=len(x))
            y = self._run(task, x[rows], tuple(map(mine, args)), {k: mine(v) for k, v in kwargs.items()})
            out = y.new_empty(len(x), *y.shape[1:]) if out is None else out
            out[rows] = y
        assert out is not None
        return out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PerTask:
        super()._apply(fn, recurse)
        self.own.apply(fn)
        return self

    def _run(self, task: str | None, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        tensors = self.own.get(task, x.device)
        y: torch.Tensor = torch.func.functional_call(self.module, tensors, (x, *args), kwargs)
        return y


def _pick(value: Any, rows: list[int], count: int) -> Any:
    """Some rows of an argument that has as many as the batch; any other argument as it is."""
    return value[rows] if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == count else value


class _Kept:
    """Tensors by task that follow the activations' device; no parameters."""

    def __init__(self, own: dict[str, dict[str, torch.Tensor]]) -> None:
        self._own = own

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`nn.Module.to` and its like."""
        self._own = {t: {n: fn(x) for n, x in tensors.items()} for t, tensors in self._own.items()}

    def get(self, task: str | None, device: torch.device) -> dict[str, torch.Tensor]:
        tensors = self._own.get(task, {}) if task is not None else {}
        if any(t.device != device for t in tensors.values()):
            self._own[str(task)] = tensors = {n: t.to(device) for n, t in tensors.items()}
        return tensors


class _TaskLayer(nn.Module):
    """A layer whose tasks' tensors follow `.to()`: bits and codes to the device, floats also to the dtype."""

    weight: nn.Parameter
    shared: kernel.Shared | None
    deltas: dict[str, kernel.Delta]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _TaskLayer:
        super()._apply(fn, recurse)
        device = self.weight.device
        self.shared = None if self.shared is None else moved(self.shared, device)
        self.deltas = {t: kernel.Delta(d.mask.to(device), d.scale) for t, d in self.deltas.items()}
        for part in ("tails", "dense", "biases"):
            if hasattr(self, part):
                setattr(self, part, {t: fn(x) for t, x in getattr(self, part).items()})
        return self


class TaskLinear(_TaskLayer):
    """y = x W0ᵀ + s x dᵀ + bias: the base's product once, each task's own added (`compress_kernels.masked_delta`).

    A task may have more outputs (`tails`, rows beyond the base's), a weight of its own (`dense`) or a bias; outputs that a row's
    task does not have are the lowest number of the dtype.
    """

    def __init__(
        self, linear: nn.Linear, shared: kernel.Shared | None, deltas: Mapping[str, kernel.Delta], tails: Tensors, dense: Tensors,
        biases: Tensors, are_signs: bool, rows: Rows,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shared, self.deltas, self.are_signs, self.rows = shared, dict(deltas), are_signs, rows
        self.tails, self.dense, self.biases = dict(tails), dict(dense), dict(biases)
        sizes = [len(self.weight) + len(t) for t in self.tails.values()] + [len(W) for W in self.dense.values()]
        self.width = max([len(self.weight), *sizes])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, …, I) -> (B, …, O)."""
        tasks = self.rows.spread(len(x))
        bias = None if self.biases else self.bias
        if self.shared is None:
            y = F.linear(x, self.weight, bias)
        else:
            y = kernel.linear(x, self.weight, bias, self.shared, self.deltas, self.are_signs, tasks)
        groups = self.rows.groups(len(x))
        for task, rows in groups.items():
            if self.biases:
                own = self.biases.get(str(task), self.bias) if task is not None else self.bias
                y[rows] = y[rows] + own if own is not None else y[rows]
        special = any(t in self.dense or t in self.tails for t in groups if t is not None)
        return self._widen(x, y, groups) if special or self.width > y.shape[-1] else y

    def _widen(self, x: torch.Tensor, y: torch.Tensor, groups: Mapping[str | None, list[int]]) -> torch.Tensor:
        base = y.shape[-1]
        out = y.new_full((*y.shape[:-1], self.width), torch.finfo(y.dtype).min)
        out[..., :base] = y
        for task, rows in groups.items():
            if task in self.tails:
                tail = self.tails[task]
                out[rows, ..., base : base + len(tail)] = F.linear(x[rows], tail)
            elif task in self.dense:
                W = self.dense[task]
                out[rows] = torch.finfo(y.dtype).min
                out[rows, ..., : len(W)] = F.linear(x[rows], W, self.biases.get(task, self.bias))
        return out


class TaskEmbedding(_TaskLayer):
    """Rows of the base's table plus what the row's task adds; tokens beyond the base's vocabulary have rows of their own."""

    def __init__(
        self, table: nn.Embedding, shared: kernel.Shared | None, deltas: Mapping[str, kernel.Delta], tails: Tensors, dense: Tensors,
        are_signs: bool, rows: Rows,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = table.weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = table.num_embeddings, table.embedding_dim, table.padding_idx
        self.shared, self.deltas, self.are_signs, self.rows = shared, dict(deltas), are_signs, rows
        self.tails, self.dense = dict(tails), dict(dense)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, …) -> (B, …, D), rounded once to the table's dtype. One row of positions stands for all rows' tasks."""
        if len(ids) == 1 and self.rows.names is not None and len(self.rows.names) > 1:
            ids = ids.expand(len(self.rows.names), *ids.shape[1:])
        out = self.weight.new_empty(*ids.shape, self.weight.shape[1])
        for task, rows in self.rows.groups(len(ids)).items():
            out[rows] = self._lookup(task, ids[rows])
        return out

    def _lookup(self, task: str | None, ids: torch.Tensor) -> torch.Tensor:
        if task in self.dense:
            return F.embedding(ids, self.dense[task])
        kinds, where = ids.unique(return_inverse=True)
        inside = kinds.clamp(max=len(self.weight) - 1)
        W = self.weight[inside]
        if task in self.deltas and self.shared is not None:
            found, D = self.deltas[task], self.weight.shape[1]
            pair = kernel.values(_rows_of(self.shared, inside), D, self.are_signs)
            own = kernel.decode(kernel.Delta(found.mask[inside], found.scale), pair, D)
            W = (W.float() + own).to(W.dtype)
        if task in self.tails:
            beyond = kinds >= len(self.weight)
            W[beyond] = self.tails[task][kinds[beyond] - len(self.weight)]
        return W[where]


def moved(shared: kernel.Shared, device: torch.device) -> kernel.Shared:
    """A shared vector on another device."""
    scale = None if shared.scale is None else shared.scale.to(device)
    low = None if shared.low is None else moved(shared.low, device)
    return replace(shared, values=shared.values.to(device), scale=scale, low=low)


def _rows_of(shared: kernel.Shared, rows: torch.Tensor) -> kernel.Shared:
    """Some rows of a shared vector."""
    values = shared.values if shared.values.dim() == 1 else shared.values[rows]
    low = None if shared.low is None else _rows_of(shared.low, rows)
    return replace(shared, values=values, scale=None if shared.scale is None else shared.scale[rows], low=low)

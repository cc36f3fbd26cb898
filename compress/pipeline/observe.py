"""Hooks on a block: fill statistics and keep module inputs while it runs, and stop it when they have what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.models.attention import listen
from compress.models.skeleton import Skeleton
from compress.pipeline.layout import Layout
from compress.pipeline.states import ModuleInputs, tensor_ids
from compress.stats import InputStats
from compress.types import Collect


class Enough(Exception):
    """Every hook has seen its input: the rest of the block need not run."""


class Observer:
    """Statistics by linear and kept inputs by module of one block."""

    def __init__(self, skeleton: Skeleton, layout: Layout, index: int, collect: Collect, tokens: int, folder: Path | None) -> None:
        self._block, prefix = skeleton.blocks[index], skeleton.prefix(index)
        self.stats: dict[str, InputStats] = {}
        for name, want in collect.stats.items():
            target = layout.targets.get(prefix + name)
            width = target.shape[1] if target else skeleton.linears(index)[name][1]
            self.stats[name] = InputStats(want, width, tokens, width if collect.group == -1 else collect.group)
        shared = set().union(*(tensor_ids(call) for call in skeleton.calls(index)))
        self.inputs = {m: ModuleInputs(folder, shared) for m in collect.modules}
        self._waiting: set[str] = set()
        self._weight: torch.Tensor | None = None
        self._stop = False

    def expect(self, weight: torch.Tensor | None, stop: bool) -> None:
        """Before each batch: its token weights (B, T), and whether to raise Enough after the last hook."""
        self._waiting, self._weight, self._stop = {*self.stats, *self.inputs}, weight, stop

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [
            self._block.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name in {**self.stats, **self.inputs}
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
            if name in self.stats:
                self.stats[name].update(args[0], self._weight)
            if name in self.inputs:
                self.inputs[name].append(tuple(args), kwargs)
            self._waiting.discard(name)
            if self._stop and not self._waiting:
                raise Enough

        return hook

    def close(self) -> None:
        """Free the kept inputs."""
        for kept in self.inputs.values():
            kept.close()


class Tokens:
    """`types.TokenView` of one batch."""

    def __init__(self, block: nn.Module, run: Callable[[], torch.Tensor], hidden: torch.Tensor, counts: torch.Tensor) -> None:
        self._block, self._run, self._hidden, self._counts = block, run, hidden, counts

    def hidden(self) -> torch.Tensor:
        return self._hidden

    def output(self) -> torch.Tensor:
        return self._run()

    def attention(self) -> torch.Tensor:
        return listen(self._block, self._run)

    def counts(self) -> torch.Tensor:
        return self._counts

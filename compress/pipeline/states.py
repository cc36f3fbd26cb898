"""Batches of tensors kept in memory or in one file: calibration states, module inputs, reference outputs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint.writer import disk_errors


class Store:
    """A list of CPU tensors, in RAM or appended to a file that is unlinked at once, so that nothing outlives the process."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._ram: list[torch.Tensor] = []
        self._where: list[tuple[int, torch.Size, torch.dtype]] = []
        self._fd: int | None = None
        self._end = 0

    def __len__(self) -> int:
        return len(self._ram) if self._folder is None else len(self._where)

    def append(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        if self._folder is None:
            self._ram.append(tensor)
            return
        if self._fd is None:
            path = self._folder / f"states-{id(self):x}.tmp"
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            path.unlink()
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        self._where.append((self._end, tensor.shape, tensor.dtype))
        with disk_errors(self._folder / "calibration states"):
            while view:
                done = os.pwrite(self._fd, view[: 64 << 20], self._end)
                view, self._end = view[done:], self._end + done

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._folder is None:
            return self._ram[index]
        assert self._fd is not None
        offset, shape, dtype = self._where[index]
        out = torch.empty(shape, dtype=dtype)
        view = memoryview(out.view(-1).view(torch.uint8).numpy())
        done = 0
        while done < len(view):
            done += os.preadv(self._fd, [view[done : done + (64 << 20)]], offset + done)
        return out

    def close(self) -> None:
        """Free the memory or the file."""
        self._ram.clear()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class ModuleInputs:
    """A module's call arguments per batch: what differs by batch is stored, what the walk holds anyway is referred to."""

    def __init__(self, folder: Path | None, shared: set[int]) -> None:
        self._store = Store(folder)
        self._shared = shared
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def append(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append((tuple(self._put(a) for a in args), {k: self._put(v) for k, v in kwargs.items()}))

    def _put(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) in self._shared:
            return value
        self._store.append(value)
        return _Slot(len(self._store) - 1)

    def __getitem__(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self._calls[batch]
        return tuple(self._get(a) for a in args), {k: self._get(v) for k, v in kwargs.items()}

    def _get(self, value: Any) -> Any:
        return self._store[value.index] if isinstance(value, _Slot) else value

    def close(self) -> None:
        self._store.close()


@dataclass(frozen=True, slots=True)
class _Slot:
    index: int


def tensor_ids(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {id(value)}
    if isinstance(value, (tuple, list)):
        return set().union(*(tensor_ids(v) for v in value))
    if isinstance(value, dict):
        return set().union(*(tensor_ids(v) for v in value.values()))
    return set()

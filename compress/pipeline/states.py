"""Batches of tensors kept in memory or in one file: calibration states, module inputs, reference outputs."""

from __future__ import annotations

import os
from pathlib import Path

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

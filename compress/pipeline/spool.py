"""Tensors whose sizes are known only when they are there: appended to spools, laid out and copied to their shards at the end.

A stream (the shared vector, a task) is one append-only file. After each step the files are synced and their lengths committed,
so a killed run cuts them back to the last resume point and goes on. `assemble` then knows every size, and the shards are planned,
checked against the free space and written as any other (`checkpoint.writer`): their bytes do not depend on kills.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import dtypes
from compress.checkpoint.writer import CheckpointWriter, Planned, disk_errors, plan_shards
from compress.errors import CompressError

_PIECE = 64 << 20


class Spool:
    """The streams of one job in a folder; `state` is what a resume point needs, JSON."""

    def __init__(self, folder: Path, state: dict[str, list[list[Any]]]) -> None:
        self.folder = folder
        self.state = state  # stream -> [[name, dtype, shape, offset], …]
        self._fds: dict[str, int] = {}
        self._current: dict[str, list[Any]] = {}
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            with disk_errors(path):
                os.truncate(path, self._length(path.name))

    def _length(self, stream: str) -> int:
        rows = self.state.get(stream, [])
        return int(rows[-1][3]) + _nbytes(rows[-1]) if rows else 0

    def begin(self, stream: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Start a tensor; its elements follow by `append`, in order."""
        assert stream not in self._current, f"{stream}: {self._current} is not whole"
        self._current[stream] = [name, dtype, list(shape), self._length(stream), 0]

    def append(self, stream: str, piece: torch.Tensor) -> None:
        """The next elements of the stream's tensor."""
        row = self._current[stream]
        view = memoryview(piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        with disk_errors(self.folder / stream):
            fd = self._fd(stream)
            while view:
                done = os.pwrite(fd, view[:_PIECE], row[3] + row[4])
                view, row[4] = view[done:], row[4] + done
        if row[4] >= _nbytes(row):
            assert row[4] == _nbytes(row), f"{row[0]}: {row[4]} bytes for {row[1]} {row[2]}"
            self.state.setdefault(stream, []).append(self._current.pop(stream)[:4])

    def put(self, stream: str, name: str, tensor: torch.Tensor) -> None:
        """A whole tensor."""
        self.begin(stream, name, dtypes.NAME[tensor.dtype], tuple(tensor.shape))
        self.append(stream, tensor)

    def _fd(self, stream: str) -> int:
        if stream not in self._fds:
            self._fds[stream] = os.open(self.folder / stream, os.O_RDWR | os.O_CREAT, 0o644)
        return self._fds[stream]

    def flush(self) -> None:
        """Make everything durable: after this a resume point may hold `state`."""
        assert not self._current, f"not whole: {self._current}"
        for stream, fd in self._fds.items():
            with disk_errors(self.folder / stream):
                os.fsync(fd)

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def size(self) -> int:
        """Bytes of all streams."""
        return sum(self._length(stream) for stream in self.state)

    def assemble(self, stream: str, folder: Path, max_shard: int) -> None:
        """Write a stream's tensors as safetensors shards of a folder, and drop its spool; nothing is written for no tensors."""
        rows = self.state.get(stream, [])
        if rows:
            plan = [Planned(str(name), str(dtype), tuple(shape)) for name, dtype, shape, _ in rows]
            need, free = sum(s.size for s in plan_shards(plan, max_shard)), shutil.disk_usage(self.folder).free
            if need > free:
                why = f"{folder}: needs {need / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB free"
                raise CompressError(why, hint="free some space and run the same command again: it resumes")
            writer = CheckpointWriter(folder, plan, max_shard)
            writer.open(fresh=True)
            for row in rows:
                start = 0
                for piece in self._pieces(stream, row):
                    writer.write_piece(str(row[0]), start, piece)
                    start += len(piece)
            writer.finish()

    def drop(self, stream: str) -> None:
        """Remove a stream's spool, once its shards are committed."""
        if stream in self._fds:
            os.close(self._fds.pop(stream))
        (self.folder / stream).unlink(missing_ok=True)

    def _pieces(self, stream: str, row: list[Any]) -> Iterator[torch.Tensor]:
        total, done, size = _nbytes(row), 0, dtypes.itemsize(str(row[1]))
        step = _PIECE // size * size
        while done < total:
            piece = torch.empty(min(step, total - done), dtype=torch.uint8)
            view, got = memoryview(piece.numpy()), 0
            while got < len(view):
                read = os.preadv(self._fd(stream), [view[got:]], int(row[3]) + done + got)
                assert read, f"{stream}: ends inside {row[0]}"
                got += read
            yield piece.view(dtypes.TORCH[str(row[1])])
            done += len(view)


def _nbytes(row: list[Any]) -> int:
    return torch.Size(row[2]).numel() * dtypes.itemsize(str(row[1]))

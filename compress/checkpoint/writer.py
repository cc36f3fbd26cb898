"""Writes a safetensors checkpoint whose every byte position is known before the first tensor is computed.

The plan (names, dtypes, shapes, in order) fixes shards, headers and offsets, so tensors may arrive in any order and at any
time, each is written once to its place, nothing is gathered in memory, and a run that was killed continues in the same
files. A shard is `<name>.tmp` until it is whole: written -> fsync -> rename.

Inside a shard tensors lie by falling element size, so that every tensor is aligned; safetensors allows no gaps.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import dtypes
from compress.checkpoint.dtypes import finite
from compress.checkpoint.reader import INDEX, SINGLE
from compress.errors import CompressError

MAX_SHARD = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor that the artifact will hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtypes.itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header's bytes, and where each tensor's data begins."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


def plan_shards(plan: Iterable[Planned], max_shard: int = MAX_SHARD) -> list[Shard]:
    """Split the plan in order into shards of at most `max_shard` bytes of data (a larger tensor gets its own)."""
    parts: list[list[Planned]] = [[]]
    used = 0
    for tensor in plan:
        if parts[-1] and used + tensor.nbytes > max_shard:
            parts.append([])
            used = 0
        parts[-1].append(tensor)
        used += tensor.nbytes
    count = len(parts)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [_lay_out(file, part) for file, part in zip(files, parts, strict=True)]


def _lay_out(file: str, tensors: list[Planned]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    begins: dict[str, int] = {}
    for t in sorted(tensors, key=lambda t: -dtypes.itemsize(t.dtype)):  # stable: plan order inside one size
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        begins[t.name] = offset
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return Shard(file, len(text).to_bytes(8, "little") + text, {n: base + b for n, b in begins.items()}, base + offset)


@contextmanager
def disk_errors(what: str | Path) -> Iterator[None]:
    """Turn a failed write into an error that says what was being written and that the run can be continued."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise CompressError(
                f"{what}: cannot be written ({os.strerror(error.errno).lower()})",
                hint="free some space or raise the limit, then run the same command again: it resumes",
            ) from error
        raise CompressError(
            f"{what}: cannot be written ({error.strerror or error})", hint="check the folder's permissions and the disk"
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically: temp -> fsync -> rename."""
    temp = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, readable and with a stable order."""
    write_file(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


class CheckpointWriter:
    """Fills the planned shards of one folder."""

    def __init__(self, folder: Path, plan: Iterable[Planned], max_shard: int = MAX_SHARD) -> None:
        self.folder = folder
        self.plan = {t.name: t for t in plan}
        self.shards = plan_shards(self.plan.values(), max_shard)
        self._where = {name: shard for shard in self.shards for name in shard.offsets}
        self._fds: dict[str, int] = {}
        self._dirty: set[str] = set()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor; its dtype and shape must be the planned ones."""
        planned = self.plan[name]
        found = (dtypes.NAME[tensor.dtype], tuple(tensor.shape))
        assert found == (planned.dtype, planned.shape), f"{name}: planned {planned}, got {found}"
        if not finite(tensor):
            raise CompressError(f"{name}: the result holds NaN or Inf", hint="report this with --debug; try another group size")
        self.write_piece(name, 0, tensor)

    def write_piece(self, name: str, start: int, piece: torch.Tensor) -> None:
        """Write elements `start`… of a tensor from a contiguous piece."""
        shard = self._where[name]
        flat = piece.detach().cpu().contiguous().view(-1)
        if flat.stride() != (1,):  # a single element may have any and be contiguous
            flat = flat.clone(memory_format=torch.contiguous_format)
        view = memoryview(flat.view(torch.uint8).numpy())
        offset = shard.offsets[name] + start * piece.element_size()
        with disk_errors(self.folder / shard.file):
            fd = self._fd(shard)
            while view:
                view_done = os.pwrite(fd, view[: 64 << 20], offset)
                view, offset = view[view_done:], offset + view_done

    def read(self, name: str) -> torch.Tensor:
        """A tensor that was written before, in this run or in the one that it resumes."""
        planned, shard = self.plan[name], self._where[name]
        out = torch.empty(planned.shape, dtype=dtypes.TORCH[planned.dtype])
        view, done = memoryview(out.view(-1).view(torch.uint8).numpy()), 0
        while done < len(view):
            got = os.preadv(self._fd(shard), [view[done : done + (64 << 20)]], shard.offsets[name] + done)
            assert got, f"{name}: not written yet"
            done += got
        return out

    def open(self, fresh: bool) -> None:
        """Create the shards, or, in a resumed run, find every one of them: a lost shard must not become zeros."""
        for shard in self.shards:
            final, temp = self.folder / shard.file, self.folder / (shard.file + ".tmp")
            if fresh:
                with disk_errors(temp), temp.open("wb") as file:
                    file.write(shard.header)
            elif not final.exists() and not temp.exists():
                raise CompressError(f"{temp}: gone since the last run", hint="--restart begins again")

    def _fd(self, shard: Shard) -> int:
        if shard.file not in self._fds:
            final, temp = self.folder / shard.file, self.folder / (shard.file + ".tmp")
            self._fds[shard.file] = os.open(final if final.exists() else temp, os.O_RDWR)
        self._dirty.add(shard.file)
        return self._fds[shard.file]

    def flush(self) -> None:
        """Make everything written so far durable: after this, a resume point may point behind it."""
        for file in sorted(self._dirty):
            with disk_errors(self.folder / file):
                os.fsync(self._fds[file])
        self._dirty.clear()

    def finish(self) -> None:
        """Rename every whole shard to its final name and write the index."""
        self.flush()
        self.close()
        for shard in self.shards:
            final, temp = self.folder / shard.file, self.folder / (shard.file + ".tmp")
            if not final.exists():
                with disk_errors(final):
                    assert temp.stat().st_size == shard.size, f"{shard.file}: {temp.stat().st_size} bytes, planned {shard.size}"
                    os.replace(temp, final)
        if len(self.shards) > 1:
            total = sum(t.nbytes for t in self.plan.values())
            weight_map = {name: self._where[name].file for name in sorted(self.plan)}
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        fsync_folder(self.folder)

    def close(self) -> None:
        """Close the shard files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

"""Tensors of a weight file as mapped pages: they take memory only while somebody reads them, and the system takes it back.

A loaded model reads its tensors with `pread` (reader.py); what its kernels do not need afterwards is put aside as such a tensor.
The file stays open: an artifact that is replaced or removed while a model is loaded does not change the model. One that is written
over in place (`cp` onto it) would; `check` makes that an error. Pages are private: writing to a tensor changes no file.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import dtypes
from compress.checkpoint.reader import CheckpointReader, Entry
from compress.errors import CompressError

logger = logging.getLogger(__name__)


class MappedFile:
    """One open weight file. Copies of a model share it; a pickled model does not have it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        self._pages = mmap.mmap(self._fd, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.path = path
        self._stamp = self._now()

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Raise where somebody wrote to the file since it was opened: its pages are other numbers then, or a bus error."""
        if self._now() != self._stamp:
            raise CompressError(f"{self.path}: was written to while its model was in use", hint="load the model again")

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedFile:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def view(self, entry: Entry) -> torch.Tensor:
        """A tensor whose memory is the file's."""
        dtype = dtypes.TORCH[entry.dtype]
        flat = torch.frombuffer(self._pages, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.offset)
        return flat.view(entry.shape)

    def read(self, entry: Entry) -> torch.Tensor:
        """A tensor in memory of its own; no page of the mapping is touched."""
        out = torch.empty(entry.shape, dtype=dtypes.TORCH[entry.dtype])
        view, done = memoryview(out.view(-1).view(torch.uint8).numpy()), 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done : done + (64 << 20)]], entry.offset + done)
            if got == 0:
                raise CompressError(f"{self.path}: was cut off while its model was in use", hint="load the model again")
            done += got
        self.check()
        return out


def _nothing() -> None:
    """What a mapped file is in another process."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies."""

    file: MappedFile | None  # None: no longer known
    entry: Entry

    def view(self) -> torch.Tensor:
        """The tensor as pages of the file."""
        assert self.file is not None
        return self.file.view(self.entry)

    def read(self) -> torch.Tensor:
        """The tensor in memory of its own."""
        assert self.file is not None
        return self.file.read(self.entry)


class Places:
    """The places of a checkpoint's tensors."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._files: dict[str, MappedFile | None] = {}

    def __call__(self, name: str) -> Place | None:
        """Where a tensor lies; None where it cannot be mapped: it is empty, or no multiple of its elements' size begins there."""
        entry = self._reader.entry(name)
        if not entry.nbytes or entry.offset % dtypes.itemsize(entry.dtype):
            return None
        if entry.file not in self._files:
            self._files[entry.file] = self._open(self._reader.folder / entry.file)
        file = self._files[entry.file]
        return None if file is None else Place(file, entry)

    @staticmethod
    def _open(path: Path) -> MappedFile | None:
        """The file, mapped; None where the system does not map it."""
        try:
            return MappedFile(path)
        except OSError as error:
            logger.info("%s cannot be mapped (%s): its weights stay in memory beside the kernels' own", path, error)
            return None

"""Reads a safetensors checkpoint, sharded or single, one tensor (or a few rows) at a time.

Tensors are read with `pread` into memory of their own rather than mapped: resident memory is what we hold, whatever the
file's size, and a truncated file is an error message instead of a bus error. One shard is open at a time. The header is
checked against the safetensors rules (github huggingface/safetensors `safetensors/src/tensor.rs`) and the file's length.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import dtypes
from compress.errors import CompressError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000
_CHUNK = 64 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # absolute, in bytes
    nbytes: int


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor with its leading dimensions flattened; a vector is one row."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; a broken or missing file is a CompressError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"{path}: cannot be read ({error.strerror})", hint="check the path") from error
    except ValueError as error:
        raise CompressError(f"{path}: not valid JSON ({error})", hint="download or save the file again") from error
    if not isinstance(value, dict):
        raise CompressError(f"{path}: not a JSON object", hint="download or save the file again")
    return value


def parse_header(path: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, every offset checked against the file's length."""

    def broken(why: str) -> CompressError:
        return CompressError(f"{path}: {why}", hint="the file is incomplete or damaged: download or copy it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise broken(f"not a whole safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CompressError(f"{path}: missing", hint="download or copy the whole checkpoint again") from error
    except OSError as error:
        raise CompressError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise broken("its header is not valid JSON") from error
    entries: dict[str, Entry] = {}
    base = 8 + length
    try:
        for name, item in header.items():
            if name == "__metadata__":
                continue
            begin, end = item["data_offsets"]
            shape = tuple(int(n) for n in item["shape"])
            if item["dtype"] not in dtypes.TORCH:
                raise broken(f"{name} has the unsupported dtype {item['dtype']}")
            if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtypes.itemsize(item["dtype"]):
                raise broken(f"{name}: its bytes do not match its shape {shape}")
            if base + end > size:
                raise broken(f"truncated: {name} ends at byte {base + end}, the file at {size}")
            entries[name] = Entry(path.name, item["dtype"], shape, base + begin, end - begin)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise broken("its header is not a safetensors header") from error
    if base + max((e.offset - base + e.nbytes for e in entries.values()), default=0) != size:
        raise broken("its length does not match its header")
    return entries


class CheckpointReader:
    """Tensors of one checkpoint folder by name."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries = self._scan()
        self._open: tuple[str, int] | None = None

    def _scan(self) -> dict[str, Entry]:
        if (self.folder / INDEX).is_file():
            return self._scan_index()
        if (self.folder / SINGLE).is_file():
            return parse_header(self.folder / SINGLE)
        if not self.folder.is_dir():
            raise CompressError(f"{self.folder}: no such folder", hint="check the path, or give a hub id such as org/name")
        pickles = [p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickles:
            raise CompressError(
                f"{self.folder}: only pickle weights ({pickles[0]}); they can run code when opened, so they are refused",
                hint="convert once, where you trust the file: AutoModelForCausalLM.from_pretrained(…).save_pretrained(NEW)",
            )
        raise CompressError(
            f"{self.folder}: no {SINGLE} and no {INDEX}",
            hint="is this a Hugging Face model folder with safetensors weights?",
        )

    def _scan_index(self) -> dict[str, Entry]:
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CompressError(f"{path}: it has no weight_map", hint="download the index again")
        entries: dict[str, Entry] = {}
        for file in sorted(set(map(str, weight_map.values()))):
            if Path(file).name != file or file in ("", ".", ".."):
                raise CompressError(f"{path}: {file!r} is not a file name in this folder", hint="do not use this checkpoint")
            found = parse_header(self.folder / file)
            wanted = {name for name, where in weight_map.items() if where == file}
            lost = sorted(wanted - found.keys())
            if lost:
                raise CompressError(
                    f"{path}: {lost[0]} should be in {file} but is not ({len(lost)} such)",
                    hint="the index and the shards are of different versions: download both again",
                )
            entries |= {name: found[name] for name in wanted}
        return dict(sorted(entries.items()))

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise CompressError(f"{self.folder}: tensor {name} is missing", hint="the checkpoint is incomplete or of another model")
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """safetensors dtype name, such as "BF16"."""
        return self.entry(name).dtype

    def files(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted({e.file for e in self.entries.values()})

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        entry = self.entry(name)
        out = torch.empty(entry.shape, dtype=dtypes.TORCH[entry.dtype])
        self._fill(entry, out, 0, name)
        return out

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows (N,) of a matrix (R, C), in the order given: (N, C)."""
        entry = self.entry(name)
        out = torch.empty((len(rows), *entry.shape[1:]), dtype=dtypes.TORCH[entry.dtype])
        stride = entry.nbytes // entry.shape[0]
        for i, row in enumerate(rows.tolist()):
            self._fill(entry, out[i], row * stride, name)
        return out

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the tensor seen as a matrix (`matrix`): (stop - start, C)."""
        entry = self.entry(name)
        columns = matrix(entry.shape)[1]
        out = torch.empty((stop - start, columns), dtype=dtypes.TORCH[entry.dtype])
        self._fill(entry, out, start * columns * dtypes.itemsize(entry.dtype), name)
        return out

    def chunks(self, name: str, limit: int = _CHUNK) -> Iterator[torch.Tensor]:
        """The tensor as flat pieces of at most `limit` bytes."""
        entry = self.entry(name)
        size = dtypes.itemsize(entry.dtype)
        total, step = entry.nbytes // size, limit // size
        for start in range(0, total, step):
            piece = torch.empty(min(step, total - start), dtype=dtypes.TORCH[entry.dtype])
            self._fill(entry, piece, start * size, name)
            yield piece

    def _fill(self, entry: Entry, out: torch.Tensor, offset: int, name: str) -> None:
        if out.numel() == 0:
            return
        view = memoryview(out.view(-1).view(torch.uint8).numpy())
        fd, done = self._fd(entry.file), 0
        while done < len(view):
            got = os.preadv(fd, [view[done : done + _CHUNK]], entry.offset + offset + done)
            if got == 0:
                raise CompressError(f"{self.folder / entry.file}: ends inside {name}", hint="download or copy the file again")
            done += got

    def _fd(self, file: str) -> int:
        if self._open is None or self._open[0] != file:
            self.close()
            try:
                self._open = (file, os.open(self.folder / file, os.O_RDONLY))
            except OSError as error:
                raise CompressError(f"{self.folder / file}: {error.strerror}", hint="check the checkpoint folder") from error
        return self._open[1]

    def close(self) -> None:
        """Close the open shard; reading reopens it."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __del__(self) -> None:
        if getattr(self, "_open", None) is not None:
            self.close()

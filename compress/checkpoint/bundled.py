"""A bundle on disk: `bundle.json`, the base by hash, the shared vector, each task's bits; and a task read as its dense checkpoint.

    bundle.json             what is where (`SCHEMA`), bit order, shapes
    base/                   reference.json, or the whole base where it was included
    shared/                 the shared vector: safetensors, a tensor per masked tensor; low/: what a bit of 0 stands for, of levels
    tasks/<t>/              model.safetensors: bits, factors, whole tensors; config.json, tokenizer and the like; task.json: errors

Every reconstruction starts from the base as it lies on the disk and is rounded once: nothing drifts, however often tasks change.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compress_kernels import masked_delta as kernel

from compress.checkpoint import dtypes, source
from compress.checkpoint.reader import CheckpointReader, Entry, matrix, read_json
from compress.errors import CompressError, nearest
from compress.formats import masked_delta

FILE, SCHEMA = "bundle.json", 1
REFERENCE = "reference.json"
GUARD = f"compress-{masked_delta.KIND}"
MASKED, WHOLE, BASE = "mask", "whole", "base"  # how a task has a tensor: bits, in full, as the base's
_ROWS = 32 << 20  # bytes of fp32 rows that are reconstructed together


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle."""
    return (folder / FILE).is_file()


def guard(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that stock transformers refuses: without it, it would load random weights or the wrong ones."""
    group = {"targets": ["Linear"], "weights": None, "input_activations": None, "output_activations": None, "format": GUARD}
    settings = {"quant_method": "compressed-tensors", "format": GUARD, "config_groups": {"group_0": group}}
    return {**config, "quantization_config": settings}


def unguard(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the dense model again."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


class Bundle:
    """A bundle, its base found and held to its hashes."""

    def __init__(self, folder: Path, base: str | Path | None = None, task: str | None = None) -> None:
        self.folder = folder
        self.facts = facts(folder)
        self.tasks = list(self.facts["tasks"])
        self.are_signs = self.facts["bits"] == "sign"
        if task is not None:
            self.task_folder(task)  # a wrong name is said before a missing base
        self.base_folder = find_base(folder, self.facts["base"], base)
        self.base = CheckpointReader(self.base_folder)
        self.shared, self.low = (_reader(folder / part) for part in ("shared", "low"))

    def task_folder(self, task: str) -> Path:
        """Where a task's own files lie; an unknown name is answered with the nearest."""
        return task_folder(self.folder, self.facts, task)

    @contextmanager
    def companions(self, task: str) -> Iterator[Path]:
        """A folder with a task's tokenizer, generation config and config.json for as long as it is needed: links, and one file."""
        own = self.task_folder(task)
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            for name, where in self.facts["tasks"][task]["files"].items():
                (folder / name).symlink_to(((self.base_folder if where == BASE else own) / name).resolve())
            (folder / "config.json").write_text(json.dumps(unguard(read_json(own / "config.json"))), encoding="utf-8")
            yield folder

    def config(self, task: str) -> dict[str, Any]:
        """config.json of a task's dense model."""
        return unguard(read_json(self.task_folder(task) / "config.json"))

    def params(self, name: str) -> dict[str, Any]:
        """Format params of a masked tensor."""
        return {"shared": self.facts["shared"], "signs": self.are_signs, "group_size": self.facts["tensors"][name]["group_size"]}

    def reader(self, task: str) -> BundledReader:
        """A task's dense checkpoint."""
        return BundledReader(self, task)

    def opened(self, name: str) -> kernel.Shared:
        """The shared vector of a masked tensor, for the kernel."""
        return self.opened_rows(name, 0, matrix(tuple(self.facts["tensors"][name]["shape"]))[0])

    def opened_rows(self, name: str, start: int, stop: int) -> kernel.Shared:
        """Some rows of it."""
        assert self.shared is not None
        found = self._rows(self.shared, name, start, stop)
        return found if self.low is None else replace(found, low=self._rows(self.low, name, start, stop))

    def _rows(self, reader: CheckpointReader, name: str, start: int, stop: int) -> kernel.Shared:
        shape, found = matrix(tuple(self.facts["tensors"][name]["shape"])), {}
        for suffix, (_, size) in masked_delta.shared_spec(self.params(name), shape).items():
            full = f"{name}.{suffix}"
            _fits(reader, full, reader.shape(full), size)
            found[suffix] = reader.read(full) if len(size) == 1 else reader.read_slice(full, start, stop)
        return masked_delta.opened(found, self.params(name))


def facts(folder: Path) -> dict[str, Any]:
    """bundle.json; one from the future is refused."""
    known = read_json(folder / FILE)
    version = known.get("version", 0)
    if known.get("schema") != SCHEMA or known.get("kind") != masked_delta.KIND or version > masked_delta.VERSION:
        why = f"{folder / FILE}: schema {known.get('schema')!r}, {known.get('kind')!r} version {version}"
        raise CompressError(f"{why}; this program reads {masked_delta.KIND} {masked_delta.VERSION}", hint="upgrade llm-compress")
    for name in (n for task, row in known["tasks"].items() for n in (task, *row["files"])):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CompressError(f"{folder / FILE}: {name!r} is not a file name", hint="do not use this bundle")
    return known


def task_folder(folder: Path, known: Mapping[str, Any], task: str) -> Path:
    """`tasks/<task>` of a bundle."""
    if task not in known["tasks"]:
        raise CompressError(f"{folder}: no task {task!r}", hint=nearest(task, list(known["tasks"])), usage=True)
    return folder / "tasks" / task


def find_base(folder: Path, wanted: Mapping[str, Any], given: str | Path | None) -> Path:
    """The base checkpoint: the given one, the one inside the bundle, or a folder or hub id of its name; hashes must agree."""
    name = str(wanted["name"])
    if given is not None:
        found = source.resolve(given)
    elif wanted["included"]:
        found = folder / "base"
    else:
        places = [folder.absolute().parent / name, Path.cwd() / name]
        here = [p for p in places if (p / "config.json").is_file()]
        if here:
            found = here[0]
        elif wanted.get("hub"):
            found = source.resolve(str(wanted["hub"]))
        else:
            raise CompressError(f"{folder}: its base {name} is not beside it", hint="give the base checkpoint: --base FOLDER")
    check_base(found, wanted)
    return found


def check_base(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse a folder whose weight files are not the base's, by sha256."""
    for file, digest in wanted["files"].items():
        path = folder / file
        if not path.is_file() or source.sha256(path) != digest:
            why = "missing" if not path.is_file() else "another content"
            raise CompressError(
                f"{folder}: not the base of this bundle, which is {wanted['name']} ({file}: {why})",
                hint="give the very checkpoint that the bundle was made from",
            )


def _reader(folder: Path) -> CheckpointReader | None:
    """The weights of a folder, if it has any."""
    return CheckpointReader(folder) if any(folder.glob("model*.safetensors")) else None


def _fits(reader: CheckpointReader, name: str, shape: tuple[int, ...], want: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the format's."""
    if shape != want:
        raise CompressError(f"{reader.folder}: {name} is {list(shape)}, wanted {list(want)}", hint="copy the bundle again")


class BundledReader(CheckpointReader):
    """The dense checkpoint of one task, under the model's names: theta_0 + s d, rounded once to the task's dtype."""

    def __init__(self, bundle: Bundle, task: str) -> None:
        self.bundle, self.task = bundle, task
        self.folder, self._open = bundle.task_folder(task), None
        self._how: Mapping[str, Mapping[str, Any]] = bundle.facts["tasks"][task]["tensors"]
        self._stored: Mapping[str, str] = bundle.facts["base"]["stored"]
        self.own = _reader(self.folder)
        self._plane: tuple[str, torch.Tensor] | None = None
        self.entries = {}
        for name, record in self._how.items():
            shape = tuple(int(n) for n in record["shape"])
            self.entries[name] = Entry("", record["dtype"], shape, -1, math.prod(shape) * dtypes.itemsize(record["dtype"]))

    def how(self, name: str) -> str:
        """`MASKED`, `WHOLE` or `BASE`."""
        return str(self._how[name]["how"])

    def files(self) -> list[str]:
        return []

    def delta(self, name: str) -> kernel.Delta:
        """A masked tensor's bits and factor."""
        assert self.own is not None
        return kernel.Delta(self.plane(name), float(self.own.read(f"{name}.scale")))

    def plane(self, name: str) -> torch.Tensor:
        """The words of a masked tensor's bits, decoded where they are coded; the last one is kept."""
        assert self.own is not None
        if self._plane is None or self._plane[0] != name:
            shape = matrix(tuple(self.bundle.facts["tensors"][name]["shape"]))
            coded = f"{name}.mask_deflate" in self.own
            words = masked_delta.inflate(self.own.read(f"{name}.mask_deflate"), shape) if coded else self.own.read(f"{name}.mask")
            _fits(self.own, f"{name}.mask", tuple(words.shape), (shape[0], masked_delta.words(shape[1])))
            self._plane = (name, words)
        return self._plane[1]

    def base_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of the base's tensor as stored."""
        return self.bundle.base.read_slice(self._stored.get(name, name), start, stop)

    def tail(self, name: str) -> torch.Tensor | None:
        """Rows beyond the base's (a grown vocabulary), or None."""
        return self.own.read(f"{name}.rows") if self.own is not None and f"{name}.rows" in self.own else None

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        dtype = dtypes.TORCH[self.entry(name).dtype]
        how = self.how(name)
        if how == BASE:
            return self.base_slice(name, start, stop).to(dtype)
        assert self.own is not None
        if how == WHOLE:
            return self.own.read_slice(name, start, stop)
        rows = int(self.bundle.facts["tensors"][name]["shape"][0]) if "rows" in self._how[name] else stop
        inside, parts = min(stop, rows), []
        if start < inside:
            parts.append(self._masked(name, start, inside).to(dtype))
        if stop > max(start, rows):
            parts.append(self.own.read_slice(f"{name}.rows", max(start - rows, 0), stop - rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _masked(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of theta_0 + s d in fp32; a tensor that only grew has no bits."""
        assert self.own is not None
        W = self.base_slice(name, start, stop).float()
        if f"{name}.scale" not in self.own:
            return W
        pair = kernel.values(self.bundle.opened_rows(name, start, stop), W.shape[1], self.bundle.are_signs)
        delta = kernel.Delta(self.plane(name)[start:stop], float(self.own.read(f"{name}.scale")))
        return W.add_(kernel.decode(delta, pair, W.shape[1]))

    def read(self, name: str) -> torch.Tensor:
        entry = self.entry(name)
        out = torch.empty(entry.shape, dtype=dtypes.TORCH[entry.dtype])
        flat, done = out.view(-1), 0
        for piece in self.chunks(name):
            flat[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.read(name)[rows]

    def chunks(self, name: str, limit: int = _ROWS) -> Iterator[torch.Tensor]:
        rows, columns = matrix(self.entry(name).shape)
        step = max(1, limit // (4 * max(columns, 1)))
        for start in range(0, rows, step):
            yield self.read_slice(name, start, min(start + step, rows)).flatten()

    def close(self) -> None:
        super().close()
        for reader in (self.own, self.bundle.shared, self.bundle.low, self.bundle.base):
            if reader is not None:
                reader.close()

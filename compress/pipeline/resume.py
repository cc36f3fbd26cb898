"""The work folder: one job's lock, fingerprint and resume point.

`OUT.partial/job.json` says whose work this is, `progress.json` how many steps are durable and what is known of them;
`report.jsonl` timings, `survey/` and `reverse/` what earlier walks kept, `artifact/` the shards. A run that finds another job's
folder refuses to touch it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from compress.checkpoint.reader import read_json
from compress.checkpoint.writer import disk_errors, fsync_folder, write_file, write_json
from compress.errors import CompressError

logger = logging.getLogger(__name__)


def fingerprint(parts: dict[str, Any]) -> str:
    """sha256 of everything that decides an artifact's bytes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Lock:
    """A work folder, made if need be, that no other run can take meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path, self.fd = path, -1
        ours = (path / "lock").exists() or not path.exists() or (path.is_dir() and not any(path.iterdir()))
        if not ours:
            raise CompressError(f"{path}: exists and is not a work folder of compress", hint="choose another --work-dir or -o")
        while self.fd < 0:
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
                fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                raise CompressError(f"{path}: another run is working here", hint="wait for it, or choose another -o") from error
            if _is(path / "lock", fd):
                self.fd = fd
            else:  # the run that had it removed the file meanwhile
                os.close(fd)

    def give(self) -> int:
        """The descriptor, which from now on is the caller's to close."""
        fd, self.fd = self.fd, -1
        return fd

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        """Release it, unless it was given away; a folder that holds nothing else goes."""
        if self.fd >= 0:
            if [p.name for p in self.path.iterdir()] == ["lock"]:
                (self.path / "lock").unlink()
                self.path.rmdir()
            os.close(self.give())


def _is(path: Path, fd: int) -> bool:
    """Whether the file at `path` is the one that is open as `fd`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


class WorkDir:
    """One job's folder, locked while this object lives; `lock` where it is locked already, which is then this object's."""

    def __init__(self, path: Path, job: str, restart: bool, lock: Lock | None = None) -> None:
        self.path, self.job = path, job
        self.artifact = path / "artifact"
        self._lock = (lock or Lock(path)).give()
        known = job_of(path)
        if known not in (None, job) and not restart:
            self.close()
            raise CompressError(
                f"{path}: holds the unfinished work of another job", hint="--restart discards it; or choose another -o"
            )
        if known != job or restart or not self.artifact.is_dir():
            self._clear()
            with disk_errors(path):
                self.artifact.mkdir()
            write_json(path / "job.json", {"job": job, "replace": restart})
        self.state: dict[str, Any] = read_json(path / "progress.json") if (path / "progress.json").exists() else {}
        self.state = {"done": 0, "linears": {}, "heads": {}, "search": [], **self.state}

    def _clear(self) -> None:
        for name in ("job.json", "progress.json", "report.jsonl"):  # job.json first: without it nothing is resumed
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.artifact, self.path / "reverse", self.path / "survey"):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                raise CompressError(f"{folder}: cannot be removed", hint="remove it, or choose another -o")

    @property
    def done(self) -> int:
        """Steps whose results are durable."""
        return int(self.state["done"])

    def commit(self, done: int) -> None:
        """Move the resume point; whatever was written before must have been flushed."""
        self.state["done"] = done
        write_json(self.path / "progress.json", self.state)

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to report.jsonl."""
        with disk_errors(self.path / "report.jsonl"), (self.path / "report.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def publish(self, out: Path, keep: bool, replace: bool, then: Callable[[], None] = lambda: None) -> None:
        """Rename the artifact to `out`, call `then`, and remove the work folder unless `keep`.

        Only with `replace` may `out` hold something.
        """
        if out.is_dir() and any(out.iterdir()) and not replace:
            raise CompressError(f"{out}: appeared while the work was going on", hint="move it away and run the same command again")
        with disk_errors(out):
            if out.is_dir():
                old = self.path / "replaced"
                shutil.rmtree(old, ignore_errors=True)
                os.replace(out, old)
            os.replace(self.artifact, out)
            fsync_folder(out.absolute().parent)
        then()
        if keep:
            for name in ("replaced", "reverse", "survey"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / "job.json").unlink(missing_ok=True)
            (self.path / "progress.json").unlink(missing_ok=True)
        else:
            try:
                _remove(self.path)
            except OSError as error:
                logger.warning("%s is left behind: %s", self.path, error)
        self.close()

    def close(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _remove(path: Path) -> None:
    """Delete a work folder; the lock, by which it is known as one, goes last."""
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != "lock":
            entry.unlink(missing_ok=True)
    (path / "lock").unlink(missing_ok=True)
    path.rmdir()


def tidy(path: Path) -> None:
    """Remove what a kill between the final rename and the clean-up left; never another run's work."""
    if not (path / "lock").exists() or (path / "artifact").exists():
        return
    lock = os.open(path / "lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except OSError:  # somebody works there, or a file of the user's lies in it: leave it
        return
    finally:
        os.close(lock)


def job_of(path: Path) -> str | None:
    """The fingerprint of the unfinished job in a work folder, if there is one."""
    return read_json(path / "job.json")["job"] if (path / "job.json").exists() else None


def may_replace(path: Path, job: str) -> bool:
    """Whether the work folder holds this job, begun with --restart: it goes on to replace what lies at OUT."""
    return job_of(path) == job and bool(read_json(path / "job.json").get("replace"))


@dataclass(frozen=True, slots=True)
class Kept:
    """What a walk kept of each block: a file per block, replaced atomically, so that each is a resume point."""

    folder: Path
    job: str  # fingerprint: another job's results are not read

    def open(self) -> None:
        """Make the folder."""
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def read(self, index: int, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
        """A block's result, or the tensors of it that are wanted by name."""
        return read_kept(self.path(index), wanted)

    def has(self, index: int) -> bool:
        """Whether a block's result is there, whole and of this job."""
        try:
            with safe_open(self.path(index), framework="pt") as file:
                return bool(file.metadata() == self._label(index))
        except (OSError, SafetensorError):
            return False

    def write(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a block's result."""
        write_file(self.path(index), to_bytes({name: t.cpu().contiguous() for name, t in tensors.items()}, self._label(index)))

    def _label(self, index: int) -> dict[str, str]:
        return {"of": f"block {index} of job {self.job}"}  # one entry: safetensors orders several as it likes


def read_kept(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The tensors of one block's result that are wanted by name."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118

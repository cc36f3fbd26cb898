"""Where an artifact goes: what lies there already, whether it may be replaced, whether it will fit."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from compress.checkpoint import manifest
from compress.checkpoint.writer import Shard, disk_errors
from compress.errors import CompressError
from compress.pipeline.resume import WorkDir

TOOL = "llm-compress"


def places(out: Path, work_dir: str | Path | None) -> tuple[Path, Path]:
    """The output folder and the work folder, with their parents made; the artifact must move by a rename between them."""
    if not out.absolute().name:
        raise CompressError(f"{out} cannot be an output folder", hint="give -o a new name", usage=True)
    work = Path(work_dir) if work_dir is not None else out.absolute().with_name(out.absolute().name + ".partial")
    a, b = out.resolve(), work.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise CompressError(f"{out} and --work-dir {work} lie inside each other", hint="put them side by side", usage=True)
    with disk_errors(out):
        for path in (out, work):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
    if out.absolute().parent.stat().st_dev != work.absolute().parent.stat().st_dev:
        raise CompressError(
            f"--work-dir {work} and {out} are on different file systems", hint="put both on one: the artifact is moved by a rename"
        )
    return out, work


def already_done(out: Path, mark: str, restart: bool, replace: bool) -> bool:
    """Whether this job's artifact lies at `out`, whole; anything else there is an error, unless it may be replaced."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise CompressError(f"{out}: exists and is not a folder", hint="choose another -o")
    if not any(out.iterdir()):
        return False
    try:
        known = manifest.read(out)
    except CompressError as error:
        raise CompressError(f"{out}: exists and is not an artifact of compress", hint="choose another -o, or remove it") from error
    if not str(known.get("tool", "")).startswith(TOOL):
        raise CompressError(f"{out}: exists and was written by another tool", hint="choose another -o, or remove it")
    if restart or (replace and known.get("job") != mark):
        return False
    if known.get("job") != mark:
        raise CompressError(f"{out}: holds the result of another job", hint="--restart replaces it; or choose another -o")
    problems = manifest.check_files(out, known)
    if problems:
        raise CompressError(f"{out}: damaged ({problems[0]})", hint="--restart makes it again")
    return True


def check_space(work: WorkDir, shards: list[Shard], spooled: int = 0) -> None:
    """Refuse to start what cannot be finished: hours are cheaper before than after.

    `spooled` is what walks will keep beside the artifact until the run is over; what lies in the folder already counts.
    """
    need = sum(s.size for s in shards) + spooled
    folders = (work.artifact, work.path / "survey", work.path / "reverse")
    have = sum(p.stat().st_blocks * 512 for folder in folders for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(work.path).free
    if need - have > free:
        beside = f", {spooled / 1e9:.2f} GB of it only for the time of the run" if spooled else ""
        raise CompressError(
            f"{work.path}: the artifact needs {(need - have) / 1e9:.2f} GB{beside}, the disk has {free / 1e9:.2f} GB free",
            hint="free some space, or choose an -o on another disk",
        )


def discard(folder: Path) -> None:
    """Remove a finished artifact, its manifest last: what a kill leaves of it is still known by that."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda p: p.name == manifest.FILE):
            path.unlink()
        folder.rmdir()


def discard_leftover(folder: Path, mark: str) -> None:
    """`discard`, of what a kill left of it in mid-work; only the artifact of the job with this fingerprint."""
    if not folder.is_dir():
        return
    empty = not any(folder.iterdir())
    if empty or ((folder / manifest.FILE).is_file() and manifest.read(folder).get("job") == mark):
        discard(folder)

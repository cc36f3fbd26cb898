"""One task of a bundle becomes an ordinary checkpoint again (`extract`)."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.checkpoint import bundled, manifest, source
from compress.checkpoint.writer import MAX_SHARD, CheckpointWriter, Planned, disk_errors, fsync_folder
from compress.errors import CompressError
from compress.fit import versions
from compress.pipeline import artifact, planes
from compress.pipeline.places import TOOL, already_done, places
from compress.pipeline.resume import WorkDir, fingerprint, may_replace


def extract(
    path: str | Path, task: str, out: str | Path, *, base: str | Path | None = None, work_dir: str | Path | None = None,
    resume: bool = True, max_shard_size: int = MAX_SHARD,
) -> Path:  # fmt: skip
    """Write one task of a bundle as an ordinary checkpoint: what `load(path, task=task)` runs, in the fine-tune's own dtype."""
    folder = Path(path)
    if not bundled.is_bundle(folder):
        raise CompressError(f"{folder}: not a bundle", hint="give the folder that compress bundle wrote", usage=True)
    opened = bundled.Bundle(folder, base, task)
    facts = {
        "tool": f"{TOOL} {versions()[TOOL]}", "format": "dense", "method": opened.facts["method"], "config": {"task": task},
        "source": {"name": task, "revision": None, "files": {bundled.FILE: source.sha256(folder / bundled.FILE)}},
        "seed": None, "calibration_sha256": None, "versions": versions(), "extra": [], "linears": {}, "search": [],
    }  # fmt: skip
    table = manifest.file_table(folder)
    mark = fingerprint({**facts, "bundle": table, "shard": max_shard_size})
    target, work_path = places(Path(out), Path(work_dir) if work_dir is not None else None)
    replace = not resume or may_replace(work_path, mark)
    if already_done(target, mark, not resume, replace):
        return target
    work = WorkDir(work_path, mark, restart=not resume)
    try:
        _copy(opened, task, work, max_shard_size)
        artifact.write_manifest(work.artifact, {**facts, "job": mark})
        work.publish(target, work_dir is not None, replace)
    finally:
        work.close()
    return target


def _copy(opened: bundled.Bundle, task: str, work: WorkDir, max_shard: int) -> None:
    """A task's tensors and files into the work folder; every tensor is a resume point."""
    reader = opened.reader(task)
    plan = [Planned(n, e.dtype, e.shape) for n, e in reader.entries.items()]
    writer = CheckpointWriter(work.artifact, plan, max_shard)
    writer.open(fresh=work.done == 0)
    since = 0
    for index, name in enumerate(reader.names):
        if index >= work.done:
            start = 0
            for piece in reader.chunks(name):
                writer.write_piece(name, start, piece)
                start += len(piece)
            since += reader.entry(name).nbytes
            if since >= planes.STEP or index + 1 == len(plan):
                writer.flush()
                work.commit(index + 1)
                since = 0
    writer.finish()
    reader.close()
    with opened.companions(task) as folder:
        for path in folder.iterdir():
            if path.name != "config.json":
                with disk_errors(work.artifact / path.name):
                    shutil.copyfile(path, work.artifact / path.name)
    artifact.write_json_as_is(work.artifact / "config.json", opened.config(task))
    fsync_folder(work.artifact)

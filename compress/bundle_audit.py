"""What a bundle is (`describe`), and whether it is whole and right (`verify`, `verify_deep`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import bundled, dtypes, manifest
from compress.checkpoint.bundled import BASE, MASKED, WHOLE, Bundle
from compress.checkpoint.reader import CheckpointReader, matrix, read_json
from compress.errors import CompressError
from compress.formats import masked_delta
from compress.formats._where import loads
from compress.pipeline import tensors
from compress.types import TensorSpec


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """One task of a bundle."""

    error: float  # |tau - reconstruction|² / |tau|² over all its deltas
    lam: float | None
    bytes: int
    masked: int  # tensors
    whole: int
    base: int
    coded: int  # masks that are stored as Huffman codes
    worst: list[tuple[str, float]]
    above_one: int


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """The facts that `compress inspect` prints of a bundle."""

    base: str
    included: bool
    method: str
    config: dict[str, Any]
    bits: str
    shared: str
    parameters: int
    bytes_shared: int
    bytes_base: int
    bytes_separate: int
    tasks: dict[str, TaskFacts]
    where: list[tuple[str, str]]
    report: dict[str, Any] | None

    @property
    def bytes(self) -> int:
        """Weight files of the bundle but for an included base."""
        return self.bytes_shared + sum(t.bytes for t in self.tasks.values())


def _weights(files: Mapping[str, Mapping[str, int]], part: str) -> int:
    return sum(f["bytes"] for n, f in files.items() if n.startswith(part) and n.endswith(".safetensors"))


def describe(folder: Path) -> BundleFacts:
    """Read a bundle's manifest and tables; no weight is read."""
    known, facts = manifest.read(folder), bundled.facts(folder)
    tasks = {}
    for name, row in facts["tasks"].items():
        table = read_json(folder / "tasks" / name / "task.json")
        how = [r["how"] for r in row["tensors"].values()]
        errors = sorted(((n, r["error"]) for n, r in table["tensors"].items()), key=lambda t: -t[1])
        own = _own(folder, name)
        coded = sum(n.endswith(".mask_deflate") for n in own.names) if own is not None else 0
        tasks[name] = TaskFacts(
            table["error"], table["lambda"], _weights(known["files"], f"tasks/{name}/"), how.count(MASKED), how.count(WHOLE),
            how.count(BASE), coded, errors[:3], sum(e > 1 for _, e in errors),
        )  # fmt: skip
    report = folder / "report.json"
    return BundleFacts(
        facts["base"]["name"], facts["base"]["included"], known["method"], known["config"], facts["bits"], facts["shared"],
        facts["parameters"], _weights(known["files"], "shared/") + _weights(known["files"], "low/"),
        known["source"]["weight_bytes"],
        sum(t["weight_bytes"] for t in known["finetunes"].values()), tasks, loads(read_json(folder / "config.json")),
        read_json(report) if report.exists() else None,
    )  # fmt: skip


def _own(folder: Path, task: str) -> CheckpointReader | None:
    return _weights_of(folder / "tasks" / task)


def _weights_of(path: Path) -> CheckpointReader | None:
    return CheckpointReader(path) if any(path.glob("model*.safetensors")) else None


def verify(folder: Path, base: str | Path | None = None) -> list[str]:
    """Problems of a bundle: files against the manifest, tensors against `bundle.json`, values; the base's hashes if it is there."""
    problems = manifest.check_files(folder, manifest.read(folder))
    if problems:
        return problems
    facts = bundled.facts(folder)
    shapes = {n: matrix(tuple(t["shape"])) for n, t in facts["tensors"].items()}
    used: set[str] = set()
    for task, row in facts["tasks"].items():
        problems += _check_task(folder, task, row, shapes, used)
    wanted: dict[str, TensorSpec] = {}
    for name in sorted(used):
        params = {"shared": facts["shared"], "group_size": facts["tensors"][name]["group_size"]}
        wanted |= {f"{name}.{s}": spec for s, spec in masked_delta.shared_spec(params, shapes[name]).items()}
    for part in ("shared", "low") if facts["bits"] == "level" else ("shared",):
        problems += _compare(part, _weights_of(folder / part), wanted)
    if base is not None or facts["base"]["included"]:
        bundled.find_base(folder, facts["base"], base)
    return problems


def _check_task(
    folder: Path, task: str, row: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], used: set[str]
) -> list[str]:  # fmt: skip
    """Problems of one task's tensors; `used` collects names that need a shared vector."""
    reader = _own(folder, task)
    names = set(reader.names) if reader is not None else set()
    wanted: dict[str, TensorSpec] = {}
    problems = []
    for name, record in row["tensors"].items():
        if record["how"] == WHOLE:
            wanted[name] = (record["dtype"], tuple(record["shape"]))
        if record["how"] != MASKED:
            continue
        if "rows" in record:
            wanted[f"{name}.rows"] = (record["dtype"], (int(record["rows"]), shapes[name][1]))
        if "rows" in record and f"{name}.scale" not in names:
            continue
        used.add(name)
        wanted[f"{name}.scale"] = ("F16", (1,))
        if f"{name}.mask_deflate" in names and reader is not None:
            coded = reader.read(f"{name}.mask_deflate")
            wanted[f"{name}.mask_deflate"] = ("U8", tuple(coded.shape))
            try:
                masked_delta.inflate(coded, shapes[name])
            except CompressError as error:
                problems.append(f"{task}: {name}: {error.message}")
        else:
            wanted[f"{name}.mask"] = ("I32", (shapes[name][0], masked_delta.words(shapes[name][1])))
    files = [n for n, where in row["files"].items() if where != BASE and not (folder / "tasks" / task / n).is_file()]
    return problems + [f"{task}: {n} is missing" for n in files] + _compare(task, reader, wanted)


def _compare(where: str, reader: CheckpointReader | None, wanted: Mapping[str, TensorSpec]) -> list[str]:
    """Missing, unexpected, misshapen tensors, NaN and Inf."""
    names = set(reader.names) if reader is not None else set()
    problems = [f"{where}: {n} is missing" for n in sorted(wanted.keys() - names)]
    problems += [f"{where}: {n} is unexpected" for n in sorted(names - wanted.keys())]
    for name in sorted(names & wanted.keys()):
        assert reader is not None
        saw = (reader.dtype(name), reader.shape(name))
        if saw != wanted[name]:
            problems.append(f"{where}: {name} is {saw}, wanted {wanted[name]}")
        elif saw[0] in dtypes.FLOATS and not all(dtypes.finite(p) for p in reader.chunks(name)):
            problems.append(f"{where}: {name} holds NaN or Inf")
    return problems


def verify_deep(folder: Path, base: str | Path, tunes: Mapping[str, str | Path]) -> list[str]:
    """Problems found by reconstructing tasks and comparing them with the fine-tunes: task.json's errors must come out again."""
    bundle = Bundle(folder, base)
    first = tensors.open_source(bundle.base_folder, str(bundle.facts["base"]["name"]))
    problems = []
    for task, path in tunes.items():
        table = read_json(bundle.task_folder(task) / "task.json")
        tune = tensors.open_source(path, task, first)
        for name, digest in tune.files.items():
            if table["source"]["files"].get(name, digest) != digest:
                hint = "give the very same fine-tune"
                raise CompressError(f"{path}: {name} is not the file that task {task} was made from", hint=hint)
        reader = bundle.reader(task)
        for name in reader.names:
            lost, total, changed = 0.0, 0.0, False
            rows, columns = matrix(reader.shape(name))
            step = max(1, tensors.ROOM // (8 * columns))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                made, want = reader.read_slice(name, start, stop).float(), tune.view.read_slice(name, start, stop).float()
                lost += float((made - want).square().sum(dtype=torch.float64))
                changed = changed or not torch.equal(made, want)
                if name in table["tensors"]:
                    known = reader.base_slice(name, start, min(stop, _base_rows(bundle, name))).float()
                    total += float((want[: len(known)] - known).square().sum(dtype=torch.float64))
            if name not in table["tensors"]:
                problems += [f"{task}: {name} differs from the fine-tune's"] if changed else []
            elif not lost / total <= table["tensors"][name]["error"] * 1.02 + 0.01:  # what the dtype rounds away
                problems.append(f"{task}: {name}: error {lost / total:.4g}, task.json says {table['tensors'][name]['error']:.4g}")
    return problems


def _base_rows(bundle: Bundle, name: str) -> int:
    """Rows of the base's tensor."""
    return matrix(tuple(bundle.facts["tensors"][name]["shape"]))[0]

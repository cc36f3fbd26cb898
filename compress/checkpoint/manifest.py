"""`manifest.json`: what an artifact is, where it came from, and the hash of every file; `verify` holds the folder to it.

Schema 1: {schema, tool, job, source{name, revision, files{path: sha256}}, method, config, seed, calibration_sha256, versions,
format, linears{name: {kind, version, params, shape, bits, error}}, heads (embedding and head, alike, if they are rounded), search,
files{path: {sha256, bytes}}}. Nothing in it depends on time, host or paths, so equal jobs give equal bytes. `report.json`
(evaluation) is outside the hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.reader import read_json
from compress.checkpoint.source import sha256
from compress.errors import CompressError

SCHEMA = 1
FILE = "manifest.json"
UNHASHED = frozenset({FILE, "report.json", f"{FILE}.tmp", "report.json.tmp"})  # .tmp: left by a kill in mid-write


def stored(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every module that is stored in a format: linears, then embedding and head."""
    return {**manifest["linears"], **manifest.get("heads", {})}


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """{path: {sha256, bytes}} of every file of an artifact but the manifest and the evaluation report."""
    return {
        str(path.relative_to(folder)): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and str(path.relative_to(folder)) not in UNHASHED
    }


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact; a folder without one, or one from the future, is refused."""
    if not folder.is_dir():
        raise CompressError(f"{folder}: no such folder", hint="give the folder that compress wrote", usage=True)
    if not (folder / FILE).is_file():
        hint = "an unfinished run? run the same command again to finish it" if folder.name.endswith(".partial") else None
        raise CompressError(
            f"{folder}: no {FILE}, so this is not a finished artifact of compress",
            hint=hint or "give the folder that compress wrote",
        )
    manifest = read_json(folder / FILE)
    if manifest.get("schema") != SCHEMA:
        raise CompressError(
            f"{folder / FILE}: schema {manifest.get('schema')!r}, this version reads {SCHEMA}",
            hint="upgrade llm-compress",
        )
    why = _malformed(manifest)
    if why is not None:
        raise CompressError(f"{folder / FILE}: {why}", hint="it was edited or cut off: copy the artifact again")
    return manifest


def _malformed(manifest: dict[str, Any]) -> str | None:
    """What of the manifest is not as every reader of it takes for granted; None where all is."""
    parts: tuple[tuple[str, type], ...] = (("source", dict), ("files", dict), ("linears", dict), ("search", list), ("config", dict))
    for key, kind in parts:
        if not isinstance(manifest.get(key), kind):
            return f"{key} is missing or not a {kind.__name__}"
    if not manifest["linears"] and manifest.get("format") not in ("dense", "bundle"):  # merged and extracted models are dense
        return "it names no linear"
    number = (int, float)
    wanted: dict[str, Any] = {"kind": str, "version": int, "params": dict, "shape": list, "bits": number, "error": number}
    heads = manifest.get("heads", {})
    if not isinstance(heads, dict):
        return "heads is not a dict"
    for name, entry in (*manifest["linears"].items(), *heads.items()):
        wrong = [key for key, of in wanted.items() if not isinstance(entry, dict) or not isinstance(entry.get(key), of)]
        if wrong or len(entry["shape"]) != 2 or not all(isinstance(n, int) and n > 0 for n in entry["shape"]):
            return f"{name} has no proper {wrong[0] if wrong else 'shape'}"
    return None


def check_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Problems with the files: missing, extra, of another size or content. Empty when all is well."""
    table = manifest["files"]
    problems = []
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - UNHASHED
    problems += [f"{name}: missing" for name in sorted(table.keys() - present)]
    problems += [f"{name}: not in the manifest" for name in sorted(present - table.keys())]
    for name in sorted(present & table.keys()):
        size, want = (folder / name).stat().st_size, table[name]
        if size != want["bytes"]:
            problems.append(f"{name}: {size} bytes, the manifest says {want['bytes']}")
        elif sha256(folder / name) != want["sha256"]:
            problems.append(f"{name}: its content differs from the manifest's hash")
    return problems

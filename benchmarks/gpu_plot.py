"""Speed-ups over dense bf16 that benchmarks/gpu.py measured, drawn per shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.cli.benchmarks import draw


def latest(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """shape -> kind -> rows of x -> speed-up: the last row of each; dry runs, and those with wrong results, are no measurements."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.get("dry") or row.get("wrong_checks"):
            continue
        if "kind" in row and "speedup" in row:
            shape = "x".join(map(str, row["shape"]))
            found.setdefault(shape, {}).setdefault(row["kind"], {})[row["M"]] = row["speedup"]
        if "decode" in row:
            found.setdefault("a token, by batch", {}).setdefault(row["decode"], {})[row["batch"]] = row["speedup"]
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> str:
    """Write one panel per shape to `path`; returns what was drawn. Raises SystemExit where no row is a measurement."""
    found = latest(rows)
    if not found:
        raise SystemExit("error: there is no measured row to draw\nhint: run benchmarks/gpu.sh on a GPU first")
    device = next(row["device"] for row in reversed(rows) if "speedup" in row)
    draw(found, path, str(device))
    return f"{path}: {', '.join(found)}"

"""Speed-ups over dense bf16 that benchmarks/gpu.py measured, drawn per shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def latest(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """shape -> kind -> rows of x -> speed-up: the last row of each; dry runs are no measurements."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if "kind" in row and "speedup" in row and not row.get("dry"):
            shape = "x".join(map(str, row["shape"]))
            found.setdefault(shape, {}).setdefault(row["kind"], {})[row["M"]] = row["speedup"]
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> str:
    """Write one panel per shape to `path`; returns what was drawn. Raises SystemExit where no row is a measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = latest(rows)
    if not found:
        raise SystemExit("error: there is no measured row to draw\nhint: run benchmarks/gpu.sh on a GPU first")
    device = next(row["device"] for row in reversed(rows) if "speedup" in row)
    figure, panels = pyplot.subplots(1, len(found), figsize=(3.4 * len(found), 3.2), sharey=True, squeeze=False)
    for panel, (shape, kinds) in zip(panels[0], found.items(), strict=True):
        for kind, points in kinds.items():
            panel.plot(sorted(points), [points[M] for M in sorted(points)], marker="o", markersize=3, label=kind)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_title(shape, fontsize=9)
        panel.set_xlabel("rows of x")
    panels[0][0].set_ylabel("times dense bf16")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(str(device), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return f"{path}: {', '.join(found)}"

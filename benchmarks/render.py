"""Write benchmarks/README.md and its plot from the results.

    python benchmarks/render.py            # needs matplotlib for the plot

Reads the docstrings in this folder for the list of benchmarks, and for the kernels' tables benchmarks/results/kernels.jsonl, to
which `compress bench kernels --threads 1 -o benchmarks/results/kernels.jsonl` appends: of every kind, shape, number of rows and
number of threads the last row counts. Whole models' tables are of results/decode.jsonl and results/load_memory.jsonl: of every
label and number of threads, and of every artifact, the last row.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from jsonl import load

from compress.cli.benchmarks import draw

HERE = Path(__file__).resolve().parent
KERNELS = HERE / "results" / "kernels.jsonl"
PAGE = HERE / "README.md"
PLOT = HERE / "kernels.png"
HELPERS = ("gpu_checks", "gpu_decode", "gpu_model", "gpu_plot", "jsonl", "render", "shapes")
DECODE, MEMORY = HERE / "results" / "decode.jsonl", HERE / "results" / "load_memory.jsonl"

Row = dict[str, Any]


def scripts() -> list[str]:
    """A row of the table for each benchmark: its name and the first line of its docstring."""
    lines = ["| script | what it measures |", "| --- | --- |"]
    for path in sorted(HERE.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        if path.stem not in HELPERS:
            lines.append(f"| `{path.name}` | {text.splitlines()[0].partition(';')[0].rstrip('.')} |")
    return lines


def latest(rows: list[Row]) -> dict[tuple[int, str], dict[str, dict[int, Row]]]:
    """(threads, shape) -> kind -> rows of x -> the last row measured."""
    found: dict[tuple[int, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        place = (row["threads"], "x".join(map(str, row["shape"])))
        found.setdefault(place, {}).setdefault(row["kind"], {})[row["rows"]] = row
    return found


def table(kinds: dict[str, dict[int, Row]]) -> list[str]:
    """Speed-ups over the dense bf16 product, the artifact's GB/s at one row, and the dense product's own milliseconds."""
    counts = sorted({n for part in kinds.values() for n in part})
    lines = ["| | " + " | ".join(f"M = {n}" for n in counts) + " | path |", "| --- |" + " --- |" * (len(counts) + 1)]
    first = next(iter(kinds.values()))
    dense = [f"{first[n]['dense_ms']:.2f} ms" if n in first else "" for n in counts]
    lines.append("| dense bf16 | " + " | ".join(dense) + " | |")
    for kind, part in kinds.items():
        cells = [f"{part[n]['dense_ms'] / part[n]['ms']:.2f}x" if n in part else "" for n in counts]
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | `{next(iter(part.values()))['path']}` |")
    return lines


def decoding(rows: list[Row]) -> list[str]:
    """Tokens per second of whole models; the machine's load says how far to trust a row."""
    last = {(row["label"], row["threads"]): row for row in rows}
    lines = [
        "## Decoding", "",
        "Tokens per second behind a prompt, best of the turns that the contenders took: of the artifact by `compress generate`'s",
        "loop and by transformers' `generate`, and of the dense model. Load is the machine's at the end: turns beside other work",
        "are slower.", "",
        "| weights | threads | loop | generate | dense bf16 | llama.cpp | loop / dense | path | load |", "| --- |" + " --- |" * 8,
    ]  # fmt: skip
    for (label, threads), row in sorted(last.items()):
        cells = [f"{row['best'][name]:.4g}" if name in row["best"] else "" for name in ("loop", "generate", "dense", "llama.cpp")]
        ratio = row["ratios"].get("loop/dense")
        cells += [f"{ratio:.2f}x" if ratio else "", f"{row['path'].partition(' ')[0]}", f"{row['load']:.0f}"]
        lines.append(f"| {label} | {threads} | " + " | ".join(cells) + " |")
    return [*lines, ""] if last else []


def memory(rows: list[Row]) -> list[str]:
    """Resident memory beside the artifact's size."""
    lines = [
        "## Memory of a loaded model", "", "Of the artifact's bytes, after what an empty model takes.", "",
        "| artifact | bytes | at the peak of loading | loaded | after a few tokens |", "| --- |" + " --- |" * 4,
    ]  # fmt: skip
    last = {row["artifact"]: row for row in rows}
    for name, row in last.items():
        shares = " | ".join(f"{row[key + '_ratio']:.2f}x" for key in ("peak", "loaded", "generated"))
        lines.append(f"| {name} | {row['bytes'] / 1e6:.0f} MB | {shares} |")
    return [*lines, ""] if last else []


def page(rows: list[Row], tokens: list[Row], loads: list[Row]) -> str:
    lines = [
        "# Benchmarks", "",
        "The documentation's numbers come from these. A docstring gives the protocol; results are appended to `results/`.",
        "This page is written by `benchmarks/render.py`.", "", *scripts(), "",
        "`compress bench kernels` and `compress bench model` time this machine's kernels and a model of yours.", "",
        "## CPU kernels", "",
        "Speed-up over torch's dense bf16 product, medians of interleaved runs, cold weights, M rows of x.",
    ]  # fmt: skip
    machines = sorted({r["machine"] for r in rows if "machine" in r})
    lines += [f"Machine: {', '.join(machines)}.", ""] if machines else [""]
    lines += [f"![speed-up over dense bf16]({PLOT.name})", ""]
    for (threads, shape), kinds in sorted(latest(rows).items()):
        lines += [f"### {shape}, {threads} thread{'s' * (threads > 1)}", "", *table(kinds), ""]
    return "\n".join([*lines, *decoding(tokens), *memory(loads)])


def plot(rows: list[Row]) -> None:
    """A panel per shape, of the smallest number of threads measured."""
    found = latest(rows)
    fewest = min(threads for threads, _ in found)
    panels = {
        f"{shape}, {threads} thread{'s' * (threads > 1)}": {
            kind: {n: row["dense_ms"] / row["ms"] for n, row in part.items()} for kind, part in kinds.items()
        }
        for (threads, shape), kinds in sorted(found.items())
        if threads == fewest
    }
    draw(panels, PLOT)


if __name__ == "__main__":
    found_rows = load(KERNELS)
    PAGE.write_text(page(found_rows, load(DECODE), load(MEMORY)))
    if found_rows:
        plot(found_rows)

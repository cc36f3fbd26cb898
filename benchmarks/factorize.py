"""Perplexity of every factorizing method at 90, 80 and 60 % of the linears' parameters; writes docs/factorization.md.

    python benchmarks/factorize.py --model out/SmolLM2-135M-Instruct [--only "svdllm;lost"] [--keep 0.8]
    python benchmarks/factorize.py --stories [--only …]
    python benchmarks/factorize.py --render

Protocol as benchmarks/quality.py: SmolLM2 with 16 calibration windows x 512 of the built-in text, 60 windows x 512 of WikiText-2,
all linears of the blocks; --stories: the shipped checkpoint, 32 windows x 256 of TinyStories. Rows are appended to
benchmarks/results/factorize.jsonl; what is there already is not measured again. Seconds are of one run on a shared machine with
OMP_NUM_THREADS threads: read them as orders of magnitude.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonl import append, load
from quality import setting

import compress
from compress.checkpoint import manifest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "factorize.jsonl"
PAGE = ROOT / "docs" / "factorization.md"
MARK = "<!-- tables by benchmarks/factorize.py -->\n"  # what the page says before it is kept
KEEPS = (0.9, 0.8, 0.6)
PAPER = {"weighting": "none", "selector": "lost", "refit": False, "columns": 0.05, "scope": "matrix", "rank_multiple": 1}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("svd", {}),
    "asvd": ("asvd", {}),
    "svdllm": ("svdllm", {}),
    "svdllm --update": ("svdllm", {"update": True}),
    "lost, as published (no covariance, no refit)": ("lost", PAPER),
    "lost --weighting none": ("lost", {"weighting": "none"}),
    "lost --scope matrix": ("lost", {"scope": "matrix"}),
    "lost --importance relative": ("lost", {"importance": "relative"}),
    "lost": ("lost", {}),
    "svdllm --recover 10": ("svdllm", {"recover": 10}),
    "lost --recover 10": ("lost", {"recover": 10}),
    "lost --then-bits 8": ("lost", {"then_bits": 8}),
    "lost --then-bits 4": ("lost", {"then_bits": 4}),
}


def ours(method: str, keep: float, what: dict[str, Any], **options: Any) -> dict[str, Any]:
    """One job."""
    data = what["data"] if method != "svd" or options.get("recover") else {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = compress.factorize(what["model"], method, out, keep=keep, **data, **options)
        value = compress.evaluate(out, text=what["text"], **what["eval"])["perplexity"].value
        known = manifest.read(out)
    losses = [f["loss"] for row in known["search"] for f in row["factors"]]
    whole = sum(e["params"]["columns"] == e["shape"][1] for e in known["linears"].values())
    row = {"perplexity": value, "seconds": round(report.seconds, 1), "bits_per_weight": report.bits_per_weight, "kept": report.kept}
    return {**row, "output_error": sum(losses) / len(losses), "whole": whole}


def dense(what: dict[str, Any]) -> dict[str, Any]:
    """The model as it is."""
    return {"perplexity": compress.evaluate(what["model"], text=what["text"], **what["eval"])["perplexity"].value}


def note(label: str, name: str, keep: float, run: Callable[[], dict[str, Any]]) -> None:
    """Run a job that has no row yet, and append its row."""
    if (label, name, keep) in {(r["model"], r["job"], r["keep"]) for r in load(RESULTS)}:
        return
    row = {"model": label, "job": name, "keep": keep, **run()}
    append(RESULTS, row)
    print(f"{label} {name:44s} {keep:4.2f} {row['perplexity']:9.3f} {row.get('seconds', 0):6.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity of every factorizing method")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--stories", action="store_true", help="the shipped checkpoint instead")
    parser.add_argument("--only", help="names of jobs, separated by semicolons")
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--render", action="store_true", help="only write docs/factorization.md from the results")
    args = parser.parse_args()
    if args.render:
        PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + render(load(RESULTS)))
        return
    what = setting(args.stories, args.model)
    label = "stories15M" if args.stories else "SmolLM2-135M"
    note(label, "dense", 1.0, lambda: dense(what))
    wanted = [n.strip() for n in args.only.split(";")] if args.only else list(JOBS)
    for name in wanted:
        for keep in args.keep:
            method, options = JOBS[name]
            note(label, name, keep, lambda m=method, o=options, k=keep: ours(m, k, what, **o))


def render(rows: list[dict[str, Any]]) -> str:
    """One table per model."""
    lines = []
    for model in sorted({r["model"] for r in rows}):
        part = [r for r in rows if r["model"] == model]
        base = next(r["perplexity"] for r in part if r["job"] == "dense")
        lines += ["", f"### {model}, dense {base:.2f}", ""]
        lines.append("| | " + " | ".join(f"{k:.0%} | bits | seconds" for k in KEEPS) + " |")
        lines.append("| --- |" + " --- |" * (3 * len(KEEPS)))
        for job in dict.fromkeys([*JOBS, *(r["job"] for r in part)]):
            found = {r["keep"]: r for r in part if r["job"] == job and job != "dense"}
            cells = [cell for k in KEEPS for cell in columns(found.get(k))]
            if found:
                lines.append(f"| {job} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def columns(row: dict[str, Any] | None) -> tuple[str, str, str]:
    """Perplexity, stored bits per weight of the linears, seconds."""
    if row is None:
        return "", "", ""
    return f"{row['perplexity']:.2f}", f"{row['bits_per_weight']:.1f}", f"{row['seconds']:.0f}"


if __name__ == "__main__":
    main()

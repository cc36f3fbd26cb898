"""What GWQ keeps, and how that is chosen: perplexity at equal bits; fills the tables of docs/gwq.md.

    python benchmarks/gwq_ablation.py --model out/SmolLM2-135M-Instruct      # or --stories: the shipped checkpoint
    python benchmarks/gwq_ablation.py --render

Protocols as in benchmarks/quality.py (calibration windows, evaluation windows). Every job: 3 bits asymmetric, groups of 16 with
3-bit scales, 1 % of the weights kept, 16 windows for gradients, unless its name says otherwise. Rows go to
benchmarks/results/gwq_ablation.jsonl; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from jsonl import append, load
from quality import ROOT, measure, setting

RESULTS = ROOT / "benchmarks" / "results" / "gwq_ablation.jsonl"
PAGE = ROOT / "docs" / "gwq.md"
BEGIN, END = "<!-- begin: gwq_ablation.py --render -->", "<!-- end -->"
SCORES = {
    "abs": "\\|g\\| (default)", "abs-gw": "\\|g w\\|", "sq": "g²", "abs-ge": "\\|g (Q(w) - w)\\|", "magnitude": "\\|w\\|",
    "random": "at random", "hessian": "(w - Q(w))² / U_cc², as SpQR",
}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {
    **{f"score {s}": {"score": s} for s in SCORES},
    "nothing kept": {"fraction": 0.0},
    **{f"quality, score {s}": {"score": s, "quality": True} for s in ("abs", "abs-ge", "random", "hessian")},
    "1 sample": {"samples": 1},
    "global": {"scope": "global"},
    "unclipped ranges": {"clip": False},
    "0.5 %": {"fraction": 0.005},
    "2 %": {"fraction": 0.02},
    "groups of 96, plain scales": {"group_size": 96},
    "plain scales": {"second_level": "off"},
}


def render(rows: list[dict[str, Any]]) -> str:
    """One table: jobs down, models across, perplexity and bits per weight."""
    models = sorted({r["model"] for r in rows})
    lines = ["| what is kept | " + " | ".join(f"{m} | bits" for m in models) + " |", "| --- |" + " --- | --- |" * len(models)]
    for job in JOBS:
        found = {r["model"]: r for r in rows if r["job"] == job}
        cells = [f"{found[m]['perplexity']:.2f} | {found[m]['bits_per_weight']:.2f}" if m in found else " | " for m in models]
        kind, _, score = job.rpartition("score ")
        name = f"{kind}{SCORES[score]}" if score in SCORES else job
        if found:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="what GWQ keeps")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--stories", action="store_true", help="the shipped checkpoint instead")
    parser.add_argument("--only", help="names of jobs, separated by semicolons")
    parser.add_argument("--render", action="store_true", help="only write the table into docs/gwq.md")
    args = parser.parse_args()
    if args.render:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{render(load(RESULTS))}\n{END}{rest.partition(END)[2]}")
        return
    what = setting(args.stories, args.model)
    label = "stories15M" if args.stories else "SmolLM2-135M"
    for name in [n.strip() for n in args.only.split(";")] if args.only else list(JOBS):
        if (label, name) in {(r["model"], r["job"]) for r in load(RESULTS)}:
            continue
        row = {"model": label, "job": name, **measure("gwq", 3, False, what, **{"group_size": 16, **JOBS[name]})}
        append(RESULTS, row)
        print(f"{label} {name:28s} {row['perplexity']:9.3f} {row['bits_per_weight']:.3f} bits", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Perplexity of every quantization method at equal bits, group and symmetry; writes docs/quality.md.

    python benchmarks/quality.py --model out/SmolLM2-135M-Instruct [--peer-python PEER/bin/python] [--only "gptq;rsq"] [--bits 3]
    python benchmarks/quality.py --render

The first form measures (SmolLM2 as in benchmarks/compare_awq.py: 16 calibration windows x 512 of the built-in text, 60 windows x
512 of WikiText-2; groups of 64; --stories instead: the shipped checkpoint, groups of 32, TinyStories) and appends to
benchmarks/results/quality.jsonl; what is there already is not measured again. The second writes the tables from that file.
PEER as in compare_awq.py; its GPTQ and AWQ run on the same windows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare_awq import peer

import compress

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
PAGE = ROOT / "docs" / "quality.md"
DATA = ROOT / "examples" / "data"
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "awq": ("awq", {}),
    "awq --quality": ("awq", {"quality": True}),
    "gptq, as its paper": ("gptq", {"act_order": "off", "clip": "off"}),
    "gptq --no-sequential": ("gptq", {"sequential": False}),
    "gptq": ("gptq", {}),
    "rsq --no-rotate": ("rsq", {"rotate": False}),
    "rsq --importance none": ("rsq", {"importance": "none"}),
    "rsq": ("rsq", {}),
}


def setting(stories: bool, model: Path) -> dict[str, Any]:
    """Model, calibration and evaluation of one of the two protocols."""
    if stories:
        return {
            "model": ROOT / "examples" / "stories15M", "group_size": 32, "text": DATA / "tinystories-valid.txt",
            "data": {"dataset": DATA / "tinystories-calibration.txt", "nsamples": 32, "seqlen": 256}, "eval": {"batch_size": 9},
        }  # fmt: skip
    return {
        "model": model, "group_size": 64, "text": ROOT / "benchmarks" / "data" / "wikitext2-test-head.txt",
        "data": {"nsamples": 16, "seqlen": 512}, "eval": {"batch_size": 4, "seqlen": 512, "windows": 60},
    }  # fmt: skip


def measure(name: str, bits: int, symmetric: bool, what: dict[str, Any]) -> dict[str, Any]:
    """One job of ours."""
    method, options = JOBS[name]
    data = {} if method == "rtn" else what["data"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = compress.quantize(
            what["model"], method, out, bits=bits, group_size=what["group_size"], symmetric=symmetric, **data, **options
        )
        value = compress.evaluate(out, text=what["text"], **what["eval"])["perplexity"].value
    return {"perplexity": value, "seconds": report.seconds, "bits_per_weight": report.bits_per_weight}


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity of every quantization method")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--stories", action="store_true", help="the shipped checkpoint instead")
    parser.add_argument("--peer-python", help="python of an environment with llmcompressor")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--only", help="names of jobs, separated by semicolons")
    parser.add_argument("--render", action="store_true", help="only write docs/quality.md from the results")
    args = parser.parse_args()
    if args.render:
        PAGE.write_text(render(load()))
        return
    what = setting(args.stories, args.model)
    label = "stories15M" if args.stories else "SmolLM2-135M"
    wanted = [n.strip() for n in args.only.split(";")] if args.only else list(JOBS)
    done = {(r["model"], r["job"], r["bits"], r["symmetric"]) for r in load()}
    for bits in args.bits:
        peers = ("llm-compressor gptq", "llm-compressor awq") if args.peer_python and not args.stories else ()
        for name in (*wanted, *peers):
            key = (label, name, bits, args.symmetric)
            if key in done:
                continue
            if name in JOBS:
                found = measure(name, bits, args.symmetric, what)
            else:
                found = peer(args.peer_python, args.model, 2, name.split()[1], bits, what["group_size"], args.symmetric)
                found = {k: found[k] for k in ("perplexity", "seconds")}
            row = dict(zip(("model", "job", "bits", "symmetric"), key, strict=True))
            row |= {"group_size": what["group_size"], **found}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{label} {name:24s} W{bits} {row['perplexity']:9.3f} {row['seconds']:6.0f} s", file=sys.stderr, flush=True)


def load() -> list[dict[str, Any]]:
    """Every row measured so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def render(rows: list[dict[str, Any]]) -> str:
    """The page: one table per model and symmetry."""
    lines = [
        "# Quality of the quantization methods", "",
        "Perplexity at equal bits, group and symmetry. Written by `benchmarks/quality.py`, whose docstring gives the protocol;",
        "the rows are in `benchmarks/results/quality.jsonl`. One small model and one text each: a comparison, not a promise.", "",
    ]  # fmt: skip
    for model, symmetric in sorted({(r["model"], r["symmetric"]) for r in rows}):
        part = [r for r in rows if (r["model"], r["symmetric"]) == (model, symmetric)]
        widths = sorted({r["bits"] for r in part}, reverse=True)
        kind = "symmetric" if symmetric else "asymmetric"
        lines += [f"## {model}, groups of {part[0]['group_size']}, {kind}", ""]
        lines += ["| | " + " | ".join(f"W{b}" for b in widths) + " |", "| --- |" + " --- |" * len(widths)]
        for job in dict.fromkeys([*JOBS, *(r["job"] for r in part)]):
            found = {r["bits"]: f"{r['perplexity']:.2f}" for r in part if r["job"] == job}
            if found:
                lines.append(f"| {job} | " + " | ".join(found.get(b, "") for b in widths) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

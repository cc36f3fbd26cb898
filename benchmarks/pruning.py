"""Perplexity of every pruning method at 50 % and 2:4 beside llm-compressor's; writes docs/pruning.md.

    python benchmarks/pruning.py --model out/SmolLM2-135M-Instruct [--peer-python PEER/bin/python] [--only "sparsegpt;wanda"]
    python benchmarks/pruning.py --stories [--only …]
    python benchmarks/pruning.py --render

Protocol as benchmarks/quality.py: SmolLM2 with 16 calibration windows x 512 of the built-in text, 60 windows x 512 of WikiText-2,
all linears of the blocks; --stories: the shipped checkpoint, 32 windows x 256 of TinyStories. PEER as in compare_awq.py, on the
same windows. Rows are appended to benchmarks/results/pruning.jsonl; what is there already is not measured again. Seconds are of
one run on a shared machine with OMP_NUM_THREADS threads: read them as orders of magnitude.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import armor_modes
from compare_awq import CALIBRATION, TEXT, last_json
from jsonl import append, load
from quality import setting

import compress
from compress.checkpoint import manifest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pruning.jsonl"
PAGE = ROOT / "docs" / "pruning.md"
SHAPES = {"50 %": "", "2:4": "2:4"}  # column -> --pattern
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "nowag": ("nowag", {}),
    "sparsegpt --refit 0": ("sparsegpt", {"refit": 0}),
    "sparsegpt --refit 0 --no-sequential": ("sparsegpt", {"refit": 0, "sequential": False}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt --no-sequential": ("sparsegpt", {"sequential": False}),
    "magnitude --recover 10": ("magnitude", {"recover": 10}),
    "wanda --recover 10": ("wanda", {"recover": 10}),
    "sparsegpt --refit 20 --recover 10": ("sparsegpt", {"refit": 20, "recover": 10}),
    "sparsegpt --recover 10": ("sparsegpt", {"recover": 10}),
    "sparsegpt --importance gradient": ("sparsegpt", {"importance": "gradient"}),
    "sparsegpt --importance gradient --scope model": ("sparsegpt", {"importance": "gradient", "scope": "model"}),
    "sparsegpt --refit 20 --importance gradient --scope model --recover 10": (
        "sparsegpt", {"refit": 20, "importance": "gradient", "scope": "model", "recover": 10},
    ),
    "sparsegpt --importance gradient --scope model --recover 10": (
        "sparsegpt", {"importance": "gradient", "scope": "model", "recover": 10},
    ),
    "sparsegpt --quality": ("sparsegpt", {"quality": True}),
    "armor --block 32": ("armor", {"block": 32}),
    "armor --block 32 --restarts 3 --recover 10": ("armor", {"block": 32, "restarts": 3, "propagate": True, "recover": 10}),
    "armor": ("armor", {}),
    "armor --mode paper --iters 500 --block 32": ("armor", {"mode": "paper", "iters": 500, "block": 32}),
    "armor --mode paper --block 32": ("armor", {"mode": "paper", "block": 32}),
    "armor --quality --block 32": ("armor", {"quality": True, "block": 32}),
}


NOTES = [
    "`sparsegpt --refit 0` is the published algorithm. By default twenty steps of conjugate gradients then improve the values that",
    "stay, so that no row's loss is above the published one's; not before `--recover`, where that gained nothing.",
    "",
    "`--importance gradient --scope model` weighs the error of every output by the squared gradient of the loss there and lets",
    "all linears compete under one threshold: on SmolLM2 they keep from 3 % to 91 % of their weights, half in total. On stories15M",
    "at 50 %: 15.74 with equal shares, 14.26 so, without recovery. `sparsegpt --quality` turns it on, with 20 epochs of recovery.",
    "",
    "Not built, because it loses (numbers in [log.md](log.md)): one B for q, k and v or for gate and up of `armor`, 1.15 to 1.9",
    "times the loss for 0.8 to 2.4 % of the bytes; v_proj.A merged into o_proj.B, which is exact but saves 0.25 % of the bytes.",
    "",
]


def ours(method: str, pattern: str, what: dict[str, Any], **options: Any) -> dict[str, Any]:
    """One job of ours."""
    data = what["data"] if method != "magnitude" or options.get("recover") else {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = compress.prune(what["model"], method, out, pattern=pattern, **data, **options)
        value = compress.evaluate(out, text=what["text"], **what["eval"])["perplexity"].value
        search = manifest.read(out)["search"]
    losses = [m["ratio"] for row in search for m in row.get("armor", []) if "ratio" in m]
    extra = {"armor_ratio": sum(losses) / len(losses), "armor_worst": max(losses)} if losses else {}
    row = {"perplexity": value, "seconds": round(report.seconds, 1), "bits_per_weight": report.bits_per_weight}
    return {**row, "zeros": report.zeros, **extra}


def theirs(python: str, model: Path, method: str, pattern: str, threads: int) -> dict[str, Any]:
    """The same job with llm-compressor, whose N:M counts zeros (2:4 is 2:4)."""
    script = ROOT / "benchmarks" / "peers" / "llmcompressor_job.py"
    args = [python, str(script), "--model", str(model), "--method", method, "--calibration", str(CALIBRATION), "--text", str(TEXT),
            "--threads", str(threads), "--pattern", pattern or "0:0", "--json"]  # fmt: skip
    return {k: v for k, v in last_json(args, threads).items() if k in ("perplexity", "seconds")}


def dense(what: dict[str, Any]) -> dict[str, Any]:
    """The model as it is."""
    return {"perplexity": compress.evaluate(what["model"], text=what["text"], **what["eval"])["perplexity"].value}


def note(label: str, name: str, shape: str, run: Callable[[], dict[str, Any]]) -> None:
    """Run a job that has no row yet, and append its row."""
    if (label, name, shape) in {(r["model"], r["job"], r["shape"]) for r in load(RESULTS)}:
        return
    row = {"model": label, "job": name, "shape": shape, **run()}
    append(RESULTS, row)
    print(f"{label} {name:32s} {shape:5s} {row['perplexity']:9.3f} {row.get('seconds', 0):6.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity of every pruning method")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--stories", action="store_true", help="the shipped checkpoint instead")
    parser.add_argument("--peer-python", help="python of an environment with llmcompressor")
    parser.add_argument("--threads", type=int, default=2, help="of the peer")
    parser.add_argument("--only", help="names of jobs, separated by semicolons")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--render", action="store_true", help="only write docs/pruning.md from the results")
    args = parser.parse_args()
    if args.render:
        PAGE.write_text(render(load(RESULTS)))
        return
    what = setting(args.stories, args.model)
    label = "stories15M" if args.stories else "SmolLM2-135M"
    note(label, "dense", "", lambda: dense(what))
    wanted = [n.strip() for n in args.only.split(";")] if args.only else list(JOBS)
    for shape in args.shapes:
        for name in wanted:
            method, options = JOBS[name]
            if (method != "armor" and "importance" not in options) or shape == ("2:4" if method == "armor" else "50 %"):
                note(label, name, shape, lambda m=method, o=options, s=shape: ours(m, SHAPES[s], what, **o))
        for method in ("sparsegpt", "wanda") if args.peer_python and not args.stories else ():
            run = lambda m=method, s=shape: theirs(args.peer_python, args.model, m, SHAPES[s], args.threads)  # noqa: E731
            note(label, f"llm-compressor {method}", shape, run)


def columns(row: dict[str, Any] | None) -> tuple[str, str, str]:
    """Perplexity, stored bits per weight of the linears, seconds."""
    if row is None:
        return "", "", ""
    bits = f"{row['bits_per_weight']:.1f}" if "bits_per_weight" in row else ""
    return f"{row['perplexity']:.2f}", bits, f"{row['seconds']:.0f}"


def render(rows: list[dict[str, Any]]) -> str:
    """The page: one table per model."""
    lines = [
        "# Quality of the pruning methods", "",
        "Perplexity with half of the weights of every linear gone, unstructured (50 %) and 2:4, and the bits per weight that the",
        "linears take (16 dense). Written by `benchmarks/pruning.py`, whose docstring gives the protocol; the rows are in",
        "`benchmarks/results/pruning.jsonl`. One small model and one text each: a comparison, not a promise.", "",
    ]  # fmt: skip
    for model in sorted({r["model"] for r in rows}):
        part = [r for r in rows if r["model"] == model]
        base = next(r["perplexity"] for r in part if r["job"] == "dense")
        lines += [f"## {model}, dense {base:.2f}", "", "| | 50 % | bits | seconds | 2:4 | bits | seconds |"]
        lines.append("| --- |" + " --- |" * 6)
        for job in dict.fromkeys([*JOBS, *(r["job"] for r in part)]):
            found = {r["shape"]: r for r in part if r["job"] == job and job != "dense"}
            cells = [text for s in SHAPES for text in columns(found.get(s))]
            if found:
                lines.append(f"| {job} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += NOTES
    modes = load(armor_modes.RESULTS)
    if modes:
        lines += [
            "## ARMOR's modes, one matrix at a time", "",
            "Losses relative to a matrix of zeros, 2:4, at most 20,000 iterations of paper mode; `loss` is fast / paper,",
            "`time` the share of the paper mode's CPU seconds. `benchmarks/armor_modes.py`. " + armor_modes.summary(modes), "",
            *armor_modes.table(modes), "",
        ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()

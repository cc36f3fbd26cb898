"""Perplexity of every quantization method at equal bits, group and symmetry; writes docs/quality.md.

    python benchmarks/quality.py --model out/SmolLM2-135M-Instruct [--peer-python PEER/bin/python] [--only "gptq;rsq"] [--bits 3]
    python benchmarks/quality.py --render

The first form measures (SmolLM2 as in benchmarks/compare_awq.py: 16 calibration windows x 512 of the built-in text, 60 windows x
512 of WikiText-2; groups of 64; --stories instead: the shipped checkpoint, groups of 32, TinyStories) and appends to
benchmarks/results/quality.jsonl; what is there already is not measured again. The second writes the tables from that file.
PEER as in compare_awq.py; its GPTQ and AWQ run on the same windows. --mixed instead measures GWQ (groups of 16, 1 % of the weights
kept) and mixed widths, which are compared by the bits that they really take. --heads measures --lm-head-bits: none, 8 and 4, with
W4 linears.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare_awq import peer
from jsonl import append, load
from transformers import AutoTokenizer

import compress
from compress.fit import dry_run

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
MIXED: dict[str, tuple[str, int, dict[str, Any]]] = {  # method, bits, options
    **{f"gwq, {b}-bit base": ("gwq", b, {"group_size": 16}) for b in (3, 4)},
    **{f"gwq --quality, {b}-bit base": ("gwq", b, {"group_size": 16, "quality": True}) for b in (3, 4)},
    "gwq --quality --score abs-ge, 3-bit base": ("gwq", 3, {"group_size": 16, "quality": True, "score": "abs-ge"}),
    **{f"{m} --target-bpw {t}": (m, 3, {"target_bpw": t}) for t in (3.0, 3.547, 4.0) for m in ("rtn", "gptq", "rsq")},
}

HEADS: dict[str, tuple[str, int | None]] = {  # method, --lm-head-bits
    f"{method}, head of {bits or 16} bits": (method, bits) for method in ("rtn", "gptq") for bits in (None, 8, 4)
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


def measure(method: str, bits: int, symmetric: bool, what: dict[str, Any], **options: Any) -> dict[str, Any]:
    """One job of ours."""
    data = {} if method == "rtn" and "target_bpw" not in options else what["data"]
    options = {"group_size": what["group_size"], **options}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = compress.quantize(what["model"], method, out, bits=bits, symmetric=symmetric, **data, **options)
        value = compress.evaluate(out, text=what["text"], **what["eval"])["perplexity"].value
    return {"perplexity": value, "seconds": report.seconds, "bits_per_weight": report.bits_per_weight, "bytes": report.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity of every quantization method")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--stories", action="store_true", help="the shipped checkpoint instead")
    parser.add_argument("--peer-python", help="python of an environment with llmcompressor")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--mixed", action="store_true", help="GWQ and mixed widths")
    parser.add_argument("--heads", action="store_true", help="rounded embeddings and heads")
    parser.add_argument("--only", help="names of jobs, the peer's too, separated by semicolons")
    parser.add_argument("--render", action="store_true", help="only write docs/quality.md from the results")
    args = parser.parse_args()
    if args.render:
        PAGE.write_text(render(load(RESULTS)))
        return
    what = setting(args.stories, args.model)
    label = "stories15M" if args.stories else "SmolLM2-135M"
    jobs: dict[str, Any] = HEADS if args.heads else MIXED if args.mixed else JOBS
    wanted = [n.strip() for n in args.only.split(";")] if args.only else list(jobs)
    if args.heads:
        for name in wanted:
            method, head = HEADS[name]
            note(label, name, 4, False, what, lambda m=method, h=head: rounded(label, m, h, what))
        return
    if args.mixed:
        for name in wanted:
            method, bits, options = MIXED[name]
            note(label, name, bits, False, what, lambda m=method, b=bits, o=options: measure(m, b, False, what, **o))
        return
    for bits in args.bits:
        peers = ("llm-compressor gptq", "llm-compressor awq") if args.peer_python and not args.only else ()
        for name in (*wanted, *peers):
            if name in JOBS:
                method, options = JOBS[name]
                run = lambda m=method, b=bits, o=options: measure(m, b, args.symmetric, what, **o)  # noqa: E731
            else:
                run = lambda n=name, b=bits: theirs(args, n.split()[1], b, what)  # noqa: E731
            note(label, name, bits, args.symmetric, what, run)


def rounded(label: str, method: str, head: int | None, what: dict[str, Any]) -> dict[str, Any]:
    """One job with a rounded head; with the head as it was, the row that is there already, and the size, which headers tell."""
    before = [r for r in load(RESULTS) if (r["model"], r["job"], r["bits"], r["symmetric"]) == (label, method, 4, False)]
    if head is not None or not before:
        return measure(method, 4, False, what, lm_head_bits=head)
    size = dry_run(what["model"], method, bits=4, symmetric=False, group_size=what["group_size"]).artifact_bytes
    return {key: before[-1][key] for key in ("perplexity", "seconds")} | {"bytes": size}


def theirs(args: argparse.Namespace, method: str, bits: int, what: dict[str, Any]) -> dict[str, Any]:
    """One job of the peer, on the same windows."""
    extra: dict[str, Any] = {}
    if args.stories:
        data = what["data"]
        ids = AutoTokenizer.from_pretrained(what["model"])(what["text"].read_text(), add_special_tokens=False)["input_ids"]
        windows = ("--nsamples", data["nsamples"], "--seqlen", data["seqlen"], "--eval-seqlen", 256, "--windows", len(ids) // 256)
        extra = {"calibration": data["dataset"], "text": what["text"], "extra": tuple(map(str, windows))}
    found = peer(args.peer_python, what["model"], 2, method, bits, what["group_size"], args.symmetric, **extra)
    return {k: found[k] for k in ("perplexity", "seconds")}


def note(label: str, name: str, bits: int, symmetric: bool, what: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Run a job that has no row yet, and append its row."""
    if (label, name, bits, symmetric) in {(r["model"], r["job"], r["bits"], r["symmetric"]) for r in load(RESULTS)}:
        return
    row = {"model": label, "job": name, "bits": bits, "symmetric": symmetric, "group_size": what["group_size"], **run()}
    append(RESULTS, row)
    print(f"{label} {name:24s} W{bits} {row['perplexity']:9.3f} {row['seconds']:6.0f} s", file=sys.stderr, flush=True)


def render(rows: list[dict[str, Any]]) -> str:
    """The page: one table per model and symmetry."""
    lines = [
        "# Quality of the quantization methods", "",
        "Perplexity at equal bits, group and symmetry. Written by `benchmarks/quality.py`, whose docstring gives the protocol;",
        "the rows are in `benchmarks/results/quality.jsonl`. One small model and one text each: a comparison, not a promise.", "",
    ]  # fmt: skip
    for model, symmetric in sorted({(r["model"], r["symmetric"]) for r in rows}):
        part = [r for r in rows if (r["model"], r["symmetric"]) == (model, symmetric) and r["job"] not in MIXED | HEADS]
        widths = sorted({r["bits"] for r in part}, reverse=True)
        kind = "symmetric" if symmetric else "asymmetric"
        lines += [f"## {model}, groups of {part[0]['group_size']}, {kind}", ""]
        lines += ["| | " + " | ".join(f"W{b}" for b in widths) + " |", "| --- |" + " --- |" * len(widths)]
        for job in dict.fromkeys([*JOBS, *(r["job"] for r in part)]):
            found = {r["bits"]: f"{r['perplexity']:.2f}" for r in part if r["job"] == job}
            if found:
                lines.append(f"| {job} | " + " | ".join(found.get(b, "") for b in widths) + " |")
        lines.append("")
    lines += mixed(rows) + heads(rows)
    return "\n".join(lines)


def heads(rows: list[dict[str, Any]]) -> list[str]:
    """Rounded embeddings and heads: perplexity and size."""
    found = {(r["model"], r["job"]): r for r in rows if r["job"] in HEADS}
    if not found:
        return []
    lines = [
        "## Rounded embedding and head", "",
        "`--lm-head-bits` with 4-bit linears, groups as above. Both models tie their heads: one tensor serves both. Sizes are",
        "those of the weight files; SmolLM2's table as it was is float32 (56.6 MB less in 16 bits), that of stories15M float16.",
        "", "| | head as it was | 8 bits | 4 bits |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for model in sorted({m for m, _ in found}):
        for method in ("rtn", "gptq"):
            cells = [found.get((model, f"{method}, head of {b} bits")) for b in (16, 8, 4)]
            shown = ["" if r is None else f"{r['perplexity']:.2f}, {r['bytes'] / 1e6:.1f} MB" for r in cells]
            if any(shown):
                lines.append(f"| {model}, {method} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def mixed(rows: list[dict[str, Any]]) -> list[str]:
    """GWQ and mixed widths beside uniform jobs, by the bits that they take."""
    uniform = ("rtn", "gptq", "rsq")
    lines = [
        "## By the bits that are stored", "",
        "GWQ: groups of 16 with 3-bit scales, 1 % of the weights in 16 bits. `--target-bpw`: each linear 2, 3, 4 or 8 bits, groups",
        "as above. Scales, zero-points and outliers are counted.", "",
    ]  # fmt: skip
    for model in sorted({r["model"] for r in rows if r["job"] in MIXED}):
        part = [r for r in rows if r["model"] == model and not r["symmetric"] and "bits_per_weight" in r]
        part = [r for r in part if r["job"] in MIXED or (r["job"] in uniform and r["bits"] > 2)]
        lines += [f"### {model}", "", "| bits per weight | job | perplexity |", "| --- | --- | --- |"]
        for r in sorted(part, key=lambda r: (round(r["bits_per_weight"], 2), -r["perplexity"])):
            name = r["job"] if r["job"] in MIXED else f"{r['job']}, W{r['bits']} groups of {r['group_size']}"
            lines.append(f"| {r['bits_per_weight']:.2f} | {name} | {r['perplexity']:.2f} |")
        lines.append("")
    return lines


if __name__ == "__main__":
    main()

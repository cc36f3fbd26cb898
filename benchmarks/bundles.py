"""Bundles of real fine-tunes: what each task keeps, and bytes; and peak memory on an 8B-shaped checkpoint. Fills docs/bundles.md.

    python benchmarks/bundles.py --base examples/stories15M --finetunes out/finetunes  # each subfolder: a model and its valid.txt
    python benchmarks/bundles.py --memory BIG --shape llama3-8b --blocks 2 --tasks 8   # makes a base and seeded fine-tunes there
    python benchmarks/bundles.py --render                                              # the part of the page from "## Measured" on

The first form bundles all fine-tunes with every method, mode and way to store the shared vector, and measures each task's loss on
the first --windows windows of its own valid.txt, of base, fine-tune and bundle. Kept = (base's loss - bundle's) / (base's loss -
fine-tune's): a share of the gain in nats per token, which is stricter than one in perplexity. Mode mask has lambda = 1. "mask,
paper" has no factors, and lambda of the grid chosen per task by loss on --tune-windows windows of text behind the measured ones.
Bytes are of weight files against the fine-tunes' own; "with base" counts the base on both sides. Rows are appended to
benchmarks/results/bundles.jsonl; what is there is not measured again. --memory appends to benchmarks/results/bundles_memory.jsonl
and exits 1 above --limit-gb.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jsonl import append, load
from random_checkpoint import SHAPES, config_for, plan, write

import compress
from compress.evaluation.bundles import evaluate_tasks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bundles.jsonl"
MEMORY = ROOT / "benchmarks" / "results" / "bundles_memory.jsonl"
PAGE = ROOT / "docs" / "bundles.md"
SHARED = ("bf16", "int8", "int4")
JOBS: dict[str, dict[str, Any]] = {
    **{f"mask, paper, {s}": {"mode": "mask", "rescale": False, "shared": s, "tuned": True} for s in ("bf16",)},
    **{f"{m}, {s}": {"mode": m, "shared": s} for m in ("mask", "refined", "sign", "levels") for s in SHARED},
    **{f"emr, {s}": {"method": "emr", "shared": s} for s in SHARED},
    "bitdelta": {"method": "bitdelta"},
    "bitdelta --embeddings": {"method": "bitdelta", "embeddings": True},
}
JOB = """
import json, sys
import compress
rows = []
def note(p):
    rows.append(p.rss / 1e9)
report = compress.bundle(sys.argv[1], sys.argv[4:], sys.argv[2], progress=note, mode=sys.argv[3], shared="int8")
status = open("/proc/self/status").read()  # ru_maxrss would begin with the parent's, who made the checkpoints
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
print(json.dumps({"peak_gb": peak, "rss_gb": rows, "seconds": report.seconds, "bytes": report.bytes,
                  "separate_gb": report.bytes_separate / 1e9, "errors": report.tasks}))
"""


def losses(report: Any) -> float:
    """Nats per token of an evaluation."""
    return math.log(report["perplexity"].value)


def cut(text: str, windows: int, seqlen: int, base: Path) -> str:
    """The part of a text behind its first windows, for choosing lambda."""
    from compress.calibration import load_tokenizer

    tokenizer = load_tokenizer(base)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][windows * seqlen :]
    out: str = tokenizer.decode(ids)
    return out


def quality(args: argparse.Namespace) -> None:
    """Every job that has no row yet."""
    folders = {p.name: p for p in sorted(args.finetunes.iterdir()) if (p / "valid.txt").is_file()}
    texts = {n: p / "valid.txt" for n, p in folders.items()}
    options = {"windows": args.windows, "seqlen": args.seqlen, "batch_size": 4}
    done = {(r["base"], r["job"]) for r in load(RESULTS)}
    label = args.base.name
    if (label, "separate") not in done:
        base = {n: losses(compress.evaluate(args.base, text=t, **options)) for n, t in texts.items()}
        own = {n: losses(compress.evaluate(folders[n], text=t, **options)) for n, t in texts.items()}
        size = sum(p.stat().st_size for f in folders.values() for p in f.glob("*.safetensors"))
        weights = sum(p.stat().st_size for p in args.base.glob("*.safetensors"))
        row = {"base": label, "job": "separate", "base_loss": base, "loss": own, "bytes": size, "base_bytes": weights}
        append(RESULTS, {**row, "windows": args.windows, "seqlen": args.seqlen})
    for name in [n.strip() for n in args.only.split(";")] if args.only else JOBS:
        if (label, name) in done:
            continue
        job = dict(JOBS[name])
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            if job.pop("tuned", False):
                job["validation"] = {}
                for task, path in texts.items():
                    job["validation"][task] = Path(folder) / f"{task}.txt"
                    job["validation"][task].write_text(cut(path.read_text(), args.windows, args.seqlen, args.base))
                job |= {"validation_windows": args.tune_windows, "seqlen": args.seqlen}
            report = compress.bundle(args.base, folders, out, **job)
            found = evaluate_tasks(out, base=args.base, text=texts, **options)
        row = {
            "base": label, "job": name, "loss": {n: losses(r) for n, r in found.items()}, "error": report.tasks,
            "lambda": report.lambdas, "bytes": report.bytes, "bytes_shared": report.bytes_shared,
            "seconds": round(report.seconds, 1),
        }  # fmt: skip
        append(RESULTS, row)
        print(name, {n: round(math.exp(x), 2) for n, x in row["loss"].items()}, report.bytes, file=sys.stderr, flush=True)


def memory(args: argparse.Namespace) -> None:
    """Make a base of the shape and seeded fine-tunes, bundle them in a fresh process, and record its peak."""
    import torch

    args.memory.mkdir(parents=True, exist_ok=True)
    config = config_for(SHAPES[args.shape], args.blocks, "bfloat16")
    shards = plan(config, 2, 2_000_000_000)
    base = args.memory / "base"
    if not base.exists():
        write(config, torch.bfloat16, 2_000_000_000, base, 0)
    tunes = []
    for i in range(args.tasks):
        tunes.append(args.memory / f"tune{i}")
        if not tunes[-1].exists():
            seeded(base, tunes[-1], i + 1)
    out = args.memory / "out"
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(base), str(out), args.mode, *map(str, tunes)],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    row = json.loads(done.stdout.strip().splitlines()[-1])
    row |= {"mode": args.mode, "shape": args.shape, "blocks": args.blocks, "tasks": args.tasks, "tensors": sum(map(len, shards))}
    append(MEMORY, row)
    print(f"{args.tasks} fine-tunes of a {row['separate_gb'] / args.tasks:.2f} GB checkpoint: peak {row['peak_gb']:.2f} GB, "
          f"{row['seconds']:.0f} s, bundle {row['bytes'] / 1e9:.2f} GB")  # fmt: skip
    if row["peak_gb"] > args.limit_gb:
        raise SystemExit(f"above the limit of {args.limit_gb} GB")


def seeded(base: Path, out: Path, seed: int) -> None:
    """A fine-tune: the base plus seeded noise of a hundredth of its weights' size, shard by shard."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty((16 << 20) + 4099 * seed, dtype=torch.bfloat16).normal_(0.0, 2e-4, generator=generator)  # repeated
    for path in sorted(base.glob("*.safetensors")):
        made = {}
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                W = file.get_tensor(name)
                flat = W.view(-1)
                for start in range(0, W.numel() if W.dim() > 1 else 0, len(pool)):
                    flat[start : start + len(pool)] += pool[: min(len(pool), W.numel() - start)]
                made[name] = W
        save_file(made, out / path.name, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="bundles of fine-tunes: quality, bytes, memory")
    parser.add_argument("--base", type=Path, default=ROOT / "examples" / "stories15M")
    parser.add_argument("--finetunes", type=Path, default=ROOT / "out" / "finetunes")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tune-windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--only", help="names of jobs, separated by semicolons")
    parser.add_argument("--memory", type=Path, help="a folder for base and fine-tunes of --shape; measures the peak instead")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--mode", default="refined", help="of --memory")
    parser.add_argument("--limit-gb", type=float, default=4.0)
    parser.add_argument("--render", action="store_true", help="only write docs/bundles.md from the results")
    args = parser.parse_args()
    if args.render:
        PAGE.write_text(render(load(RESULTS), load(MEMORY)))
    elif args.memory is not None:
        memory(args)
    else:
        quality(args)


# -- the page --------------------------------------------------------------------------------------------------------------


def kept(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Share of each task's gain."""
    base, own = reference["base_loss"], reference["loss"]
    return {n: (base[n] - x) / (base[n] - own[n]) for n, x in row["loss"].items()}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One base's table."""
    reference = next(r for r in rows if r["job"] == "separate")
    tasks = list(reference["loss"])
    lines = [
        "| | " + " | ".join(tasks) + " | kept, mean | kept, least | delta error | bytes | with base |",
        "| --- |" + " --- |" * (len(tasks) + 5),
        "| base | " + " | ".join(f"{math.exp(reference['base_loss'][t]):.1f}" for t in tasks) + " | 0 | 0 | | | |",
        "| separate fine-tunes | " + " | ".join(f"{math.exp(reference['loss'][t]):.2f}" for t in tasks)
        + f" | 1 | 1 | 0 | {reference['bytes'] / 1e6:.1f} MB | 100 % |",
    ]  # fmt: skip
    found = {r["job"]: r for r in rows}
    for job in JOBS:
        if job not in found:
            continue
        row = found[job]
        share = kept(row, reference)
        cells = [f"{math.exp(row['loss'][t]):.2f} ({share[t]:.3f})" for t in tasks]
        size, base = row["bytes"], reference["base_bytes"]
        error = sum(row["error"].values()) / len(tasks)
        lines.append(
            f"| {job} | "
            + " | ".join(cells)
            + f" | {sum(share.values()) / len(share):.3f} | {min(share.values()):.3f} | {error:.3f} | "
            f"{size / 1e6:.1f} MB, {size / reference['bytes']:.1%} | "
            f"{(size + base) / (reference['bytes'] + base):.1%} |"
        )
    return lines


def render(rows: list[dict[str, Any]], memories: list[dict[str, Any]]) -> str:
    """The whole page."""
    lines = [PAGE.read_text().partition("## Measured")[0] + "## Measured", ""]
    for base in dict.fromkeys(r["base"] for r in rows):
        part = [r for r in rows if r["base"] == base]
        reference = next(r for r in part if r["job"] == "separate")
        lines += [
            f"### {len(reference['loss'])} fine-tunes of {base}", "",
            f"Perplexity on the first {reference['windows']} windows of {reference['seqlen']} tokens of each task's own text, and",
            "in brackets the share of the fine-tune's gain over the base that is kept, in nats per token. Bytes are of weights:",
            "the bundle's, also as a share of the separate checkpoints', and that share with the base counted on both sides.",
            "Delta error is |tau - reconstruction|² / |tau|², the tasks' mean.", "", *table(part), "",
        ]  # fmt: skip
        tuned = next((r["lambda"] for r in part if r["job"].startswith("mask, paper")), None)
        if tuned:
            chosen = ", ".join(f"{n} {x:g}" for n, x in tuned.items())
            lines += [f"lambda that mask, paper chose: {chosen}.", ""]
    if memories:
        lines += [
            "### Memory",
            "",
            "| checkpoint | fine-tunes | mode | peak | bundle | seconds |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for m in memories:
            one = m["separate_gb"] / m["tasks"]
            cells = f"{m['tasks']} | {m['mode']} | {m['peak_gb']:.2f} GB | {m['bytes'] / 1e9:.2f} GB | {m['seconds']:.0f} |"
            lines.append(f"| {m['shape']}, {m['blocks']} blocks, {one:.2f} GB | {cells}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

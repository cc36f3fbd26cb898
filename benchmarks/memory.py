"""Peak memory on a checkpoint larger than the limit: RTN and GWQ over all blocks, AWQ and pruning over a few, block by block.

    python benchmarks/random_checkpoint.py --shape llama3-8b --blocks 32 --out BIG      # 16 GB
    python benchmarks/memory.py --model BIG [--few BIG4] [--methods rtn awq …] [--limit-gb 4] [--plot memory.png]

--few may be a shallower checkpoint of the same shapes, for all methods but RTN and GWQ. AWQ and the pruning methods use 4
windows of 128 tokens; GWQ, a reverse walk over every block and then a forward one, 2 windows of 128 and unclipped ranges;
D-Pruner walks three times. What is measured is the resident memory of the whole process, libraries included: ru_maxrss at
the end, and after every block. Exits 1 above the limit. Results are appended to benchmarks/results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jsonl import append

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.jsonl"
METHODS = ("rtn", "awq", "gwq", "sparsegpt", "dpruner")
JOB = """
import json, resource, sys
import compress.fit
options = json.loads(sys.argv[3])
method, verb = options.pop("method"), options.pop("verb")
predicted = compress.fit.dry_run(sys.argv[1], method, verb=verb, **options)
rows = []
def note(p):
    rows.append({"block": p.block, "rss_gb": p.rss / 1e9, "seconds": p.seconds, "reverse": p.error is None})
    print(f"  block {p.block + 1}/{p.blocks}  {p.rss / 1e9:.2f} GB  {p.seconds:.1f} s", file=sys.stderr, flush=True)
report = getattr(compress.fit, verb)(sys.argv[1], method, sys.argv[2], progress=note, **options)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(json.dumps({"peak_gb": peak, "predicted_gb": predicted.peak_memory / 1e9, "predicted_bytes": predicted.artifact_bytes,
                  "bytes": report.bytes, "source_gb": report.source_bytes / 1e9, "seconds": report.seconds,
                  "predicted_seconds": predicted.seconds, "blocks": rows}))
"""


def run(model: Path, method: str, verb: str = "quantize", **options: Any) -> dict[str, Any]:
    """One job in a fresh process; its artifact is thrown away."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        args = [sys.executable, "-c", JOB, str(model), f"{folder}/out", json.dumps({"method": method, "verb": verb, **options})]
        done = subprocess.run(args, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"method": method, **result}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Resident memory after every block."""
    import matplotlib.pyplot as plt

    for row in rows:
        plt.plot([b["rss_gb"] for b in row["blocks"]], marker=".", label=row["method"])
    plt.xlabel("blocks done (gwq: the reverse walk, then the forward one)")
    plt.ylabel("resident memory after the block, GB")
    plt.ylim(0)
    plt.legend()
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory on a large checkpoint")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--few", type=Path, help="a shallower checkpoint for the slower methods")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["rtn", "awq", "gwq"])
    parser.add_argument("--limit-gb", type=float, default=4.0)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    few, windows = args.few or args.model, {"nsamples": 4, "seqlen": 128}
    domain = {"domain_dataset": str(ROOT / "compress" / "data" / "calibration.txt"), "samples": 4}
    jobs: dict[str, tuple[Path, dict[str, Any]]] = {
        "rtn": (args.model, {"bits": 4, "group_size": 128}),
        "awq": (few, {"bits": 4, "group_size": 128, **windows}),
        "gwq": (args.model, {"nsamples": 2, "seqlen": 128, "clip": False}),
        "sparsegpt": (few, {"verb": "prune", "pattern": "2:4", **windows}),
        "dpruner": (few, {"verb": "prune", **domain, **windows}),
    }
    rows = [run(jobs[method][0], method, **jobs[method][1]) for method in args.methods]
    for row in rows:
        append(RESULTS, row)
        blocks = [b["rss_gb"] for b in row["blocks"]]
        size = "exact" if row["bytes"] == row["predicted_bytes"] else "WRONG"
        count = len({b["block"] for b in row["blocks"]})
        print(f"{row['method']}: {count} blocks of a {row['source_gb']:.1f} GB checkpoint, {row['seconds']:.0f} s")
        print(f"  peak {row['peak_gb']:.2f} GB, after the first block {blocks[0]:.2f}, after the last {blocks[-1]:.2f}")
        print(f"  predicted {row['predicted_gb']:.2f} GB, {row['predicted_seconds']:.0f} s, artifact size {size}")
    if args.plot:
        plot(rows, args.plot)
    if any(row["peak_gb"] > args.limit_gb for row in rows):
        raise SystemExit(f"above the limit of {args.limit_gb} GB")


if __name__ == "__main__":
    main()

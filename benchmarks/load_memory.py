"""Memory that loading an artifact takes, beside the artifact's size: at the peak, and afterwards.

    python benchmarks/load_memory.py ART … [--limit 1.2]
    python benchmarks/load_memory.py --shape llama3-8b --work FOLDER     # a 16 GB checkpoint, then its artifact

With --shape a checkpoint of random weights is made, quantized and removed (`shapes.py`).

A fresh process imports what loading imports, builds an empty model, notes its resident memory, then loads the artifact, notes
VmHWM and VmRSS, and notes VmRSS again after a few tokens. The differences are the model's. Results are appended to
benchmarks/results/load_memory.jsonl; exits 1 above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import shapes
from jsonl import append

RESULTS = Path(__file__).resolve().parent / "results" / "load_memory.jsonl"
JOB = """
import json, sys
from pathlib import Path
def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key + ":"))
    return int(line.split()[1]) * 1024
import torch
import compress
from compress.loading import _empty
from compress.models.skeleton import load_config
compress.register()
import compress.modules, compress.audit
folder = Path(sys.argv[1])
_empty(load_config(folder, compressed=True), torch.bfloat16)
base = status("VmRSS")
model = compress.load(folder, dtype=sys.argv[2])
peak, after = status("VmHWM"), status("VmRSS")
ids = torch.arange(1, 9)[None]
with torch.inference_mode():
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
used = status("VmRSS")
paths = sorted({m.path for m in model.modules() if isinstance(m, compress.modules.CompressedWeight) and m.prepared is not None})
print(json.dumps({"base": base, "peak": peak - base, "loaded": after - base, "generated": used - base, "paths": paths}))
"""


def measure(folder: Path, dtype: str, label: str = "") -> dict[str, Any]:
    """One artifact in a fresh process."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", JOB, str(folder), dtype], stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    ratios = {f"{key}_ratio": round(found[key] / size, 3) for key in ("peak", "loaded", "generated")}
    return {"artifact": label or folder.name, "dtype": dtype, "bytes": size, **found, **ratios}


def main() -> None:
    """Measure every artifact."""
    parser = argparse.ArgumentParser(description="memory at load")
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=float, default=1.2)
    shapes.options(parser)
    args = parser.parse_args()
    if bool(args.artifacts) == bool(args.shape):
        parser.error("name artifacts, or --shape")
    rows = [measure(folder, args.dtype) for folder in args.artifacts]
    if args.shape:
        with shapes.made(args, dense=False) as made:
            rows.append(measure(made.artifact, args.dtype, made.label))
    for row in rows:
        append(RESULTS, row)
        print(
            f"{row['artifact']}: {row['bytes'] / 1e6:.1f} MB, at load {row['peak_ratio']:.2f}x, then {row['loaded_ratio']:.2f}x, "
            f"after a few tokens {row['generated_ratio']:.2f}x ({', '.join(row['paths'])})"
        )
    if any(row["peak_ratio"] > args.limit for row in rows):
        raise SystemExit(f"above {args.limit}x")


if __name__ == "__main__":
    main()

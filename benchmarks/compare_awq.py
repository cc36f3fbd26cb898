"""AWQ (or GPTQ) and RTN beside llm-compressor's, on the same windows, in interleaved runs: perplexity, wall time, peak memory.

    python benchmarks/compare_awq.py --model out/SmolLM2-135M-Instruct --peer-python PEER/bin/python [--method gptq] [--repeat 1]

Make PEER with `python -m venv PEER && PEER/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 transformers==5.17.0`. Without
--peer-python only our side runs. Protocol: calibration = the first 16 windows x 512 of the built-in text, evaluation = the first
60 windows x 512 of WikiText-2 raw test, float32, groups of 64, every linear of the blocks, two threads. Seconds are of the
compression call; memory is the process's peak above what the imported libraries take. Our seconds include reading the
checkpoint and writing the artifact; the peer's model is already in memory and nothing is written.
Results are appended to benchmarks/results/compare_<method>.jsonl. Read ratios: machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jsonl import append

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "benchmarks" / "data" / "wikitext2-test-head.txt"
CALIBRATION = ROOT / "compress" / "data" / "calibration.txt"
RESULTS = ROOT / "benchmarks" / "results"
JOBS: dict[str, dict[str, dict[str, Any]]] = {  # ours, before and after the peer
    "awq": {"compress awq": {}, "compress awq --quality": {"quality": True}},
    "gptq": {"compress gptq": {"symmetric": False}, "compress gptq --no-sequential": {"symmetric": False, "sequential": False}},
}

OURS = """
import json, os, resource, sys, time
from pathlib import Path
import torch, transformers, accelerate, safetensors
import transformers.models.llama.modeling_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # the peer's script has them imported by then, too
import compress.fit
torch.set_num_threads(int(sys.argv[4]))
base = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
options = json.loads(sys.argv[3])
method = options.pop("method")
start = time.perf_counter()
compress.fit.quantize(sys.argv[1], method, sys.argv[2], resume=False, **options)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
from compress.evaluation import evaluate
report = evaluate(sys.argv[2], text=sys.argv[5], seqlen=512, windows=60, batch_size=4)
value = next(m.value for m in report.metrics if m.name == "perplexity")
print(json.dumps({"perplexity": value, "seconds": seconds, "peak_rss_gb": peak, "baseline_rss_gb": base}))
"""


def ours(model: Path, threads: int, **options: Any) -> dict[str, Any]:
    """One of our jobs in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        args = [sys.executable, "-c", OURS, str(model), f"{folder}/out", json.dumps(options), str(threads), str(TEXT)]
        return last_json(args, threads)


def peer(
    python: str, model: Path, threads: int, method: str, bits: int, group_size: int, symmetric: bool = False,
    calibration: Path = CALIBRATION, text: Path = TEXT, extra: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """The same job with llm-compressor; `extra` are further arguments of peers/llmcompressor_job.py."""
    script = ROOT / "benchmarks" / "peers" / "llmcompressor_job.py"
    args = [python, str(script), "--model", str(model), "--method", method, "--bits", str(bits), "--group-size", str(group_size),
            "--symmetric" if symmetric else "--asymmetric", "--calibration", str(calibration), "--text", str(text), "--threads",
            str(threads), "--json", *extra]  # fmt: skip
    return last_json(args, threads)


def last_json(args: list[str], threads: int) -> dict[str, Any]:
    """Run a command and parse the last line of its output."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(args, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"a run failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="AWQ, GPTQ and RTN beside llm-compressor")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer-python", help="python of an environment with llmcompressor")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--method", choices=tuple(JOBS), default="awq")
    parser.add_argument("--only-default", action="store_true", help="leave out our second mode")
    parser.add_argument("--rtn-peer", action="store_true", help="run the peer's RTN too")
    args = parser.parse_args()
    data = {"nsamples": 16, "seqlen": 512}
    rows: list[dict[str, Any]] = []
    for repeat in range(args.repeat):
        for bits in args.bits:
            grid = {"bits": bits, "group_size": args.group_size}
            jobs: list[tuple[str, Any]] = [("compress rtn", lambda grid=grid: ours(args.model, args.threads, method="rtn", **grid))]
            for name, options in JOBS[args.method].items():
                settings = {"method": args.method, **grid, **data, **options}
                jobs.append((name, lambda settings=settings: ours(args.model, args.threads, **settings)))
            if args.peer_python:
                for method in ("rtn", args.method) if args.rtn_peer else (args.method,):
                    run = lambda m=method, b=bits: peer(  # noqa: E731
                        args.peer_python, args.model, args.threads, m, b, args.group_size
                    )
                    jobs.insert(2, (f"llm-compressor {method}", run))
            if args.only_default:
                jobs.pop()
            for name, job in jobs:
                row = {
                    "job": name,
                    "repeat": repeat,
                    "model": args.model.name,
                    **grid,
                    "threads": args.threads,
                    **job(),
                }
                rows.append(row)
                append(RESULTS / f"compare_{args.method}.jsonl", row)
                print(
                    f"  {name:24s} W{bits}  {row['perplexity']:.2f}  {row['seconds']:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    show(rows, args.bits, f"llm-compressor {args.method}")


def show(rows: list[dict[str, Any]], widths: list[int], reference: str) -> None:
    """Medians over the repeats, and ratios to the peer's job of the same width."""
    print(f"{'job':26s} {'bits':>4s} {'perplexity':>10s} {'seconds':>8s} {'GB above libraries':>18s} {'time':>6s} {'memory':>6s}")
    for bits in widths:
        names = list(dict.fromkeys(r["job"] for r in rows))

        def median(name: str, key: str, bits: int = bits) -> float:
            values = [r[key] if key != "above" else r["peak_rss_gb"] - r["baseline_rss_gb"]
                      for r in rows if r["job"] == name and r["bits"] == bits]  # fmt: skip
            return statistics.median(values)

        for name in names:
            ratios = ("", "")
            if reference in names:
                time = median(name, "seconds") / median(reference, "seconds")
                memory = median(name, "above") / median(reference, "above")
                ratios = (f"{time:.2f}x", f"{memory:.2f}x")
            print(
                f"{name:26s} {bits:4d} {median(name, 'perplexity'):10.2f} {median(name, 'seconds'):8.0f} "
                f"{median(name, 'above'):18.2f} {ratios[0]:>6s} {ratios[1]:>6s}"
            )


if __name__ == "__main__":
    main()

"""The GPU kernels on the GPU at hand: right against fp64, and times beside dense bf16; run by gpu.sh.

    benchmarks/gpu.sh [--out FILE] [--minutes 8.5] [--tune 2.5] [--table FILE] [--kinds W4 …] [--shapes 14336x4096 …] [--rows 1 …]
    benchmarks/gpu.sh --plot PNG [--out FILE]      the speed-ups in FILE, drawn; measures nothing
    benchmarks/gpu.sh --dry                        all of it at toy size in Triton's interpreter

First every kernel is checked, and a small model through its own modules. A wrong result makes the exit code 1; all that is timed
afterwards then says how many were wrong, and is no measurement. Then the table of W4's ways is measured (`gpu_tune`), for the rest
of the run and to be kept; the GPU's own ceilings; a token of a Llama-3-8B-shaped model (`gpu_decode`); and products of that model's
shapes. Times are of CUDA-graph replays in which the weights go round through 192 MB of copies, so that they come from memory;
inputs and weights are random. Every row has the device, versions and the commit. `or_dense` in a row: the speed-up where the
weight has a dense copy (COMPRESS_GPU_DENSE), which takes the faster of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:  # Triton reads this when it is first imported
    os.environ |= {"TRITON_INTERPRET": "1", "COMPRESS_BACKEND": "triton"}

import torch
from compress_kernels import gpu_table, gpu_tune
from compress_kernels.int_grouped import triton
from compress_kernels.int_grouped_outliers import triton as outliers
from gpu_checks import checks
from gpu_decode import decode
from gpu_model import model
from jsonl import append, load

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ["6144x4096", "4096x4096", "28672x4096", "4096x14336", "14336x4096", "128256x4096", "1024x4096"]  # outputs x inputs
KINDS = {"W4": (4, 0.0), "W3": (3, 0.0), "W4+1%": (4, 0.01), "W2": (2, 0.0), "W8": (8, 0.0)}
ROWS = [1, 4, 16, 64, 256, 4096]
GROUP = 128


def shape(text: str) -> tuple[int, int]:
    """(O, I) of "14336x4096"."""
    O, _, I = text.partition("x")
    if not (O.isdigit() and I.isdigit() and int(O) and int(I) and int(I) % GROUP == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not OUTPUTSxINPUTS with inputs in groups of {GROUP}")
    return int(O), int(I)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="JSON lines are appended here (benchmarks/results/gpu.jsonl)")
    parser.add_argument("--minutes", type=float, default=8.5, help="no cell is begun later than this")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--shapes", nargs="+", type=shape, default=None)
    parser.add_argument("--rows", nargs="+", type=int, default=None, help="rows of x")
    parser.add_argument("--tune", type=float, default=2.5, help="minutes for the table of W4's ways; 0: none, use what there is")
    parser.add_argument("--table", type=Path, default=None, help="where that table is kept (beside --out)")
    parser.add_argument("--plot", type=Path, default=None, help="draw the speed-ups of --out's rows into this file, and stop")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter, no GPU, no times")
    options = parser.parse_args(argv)
    options.shapes = options.shapes or [shape(s) for s in (["256x256"] if options.dry else SHAPES)]
    options.tuned = [(256, 256)] if options.dry else [s for s in options.shapes if s[0] % 128 == 0 and s[1] % 256 == 0]
    options.rows = options.rows or ([1, 3] if options.dry else ROWS)
    if min(options.rows) < 1 or options.minutes <= 0 or options.tune < 0:
        parser.error("--rows are at least 1, --minutes above 0, --tune at least 0")
    if not options.dry and options.plot is None and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry checks this script without one")
    options.out = options.out or (None if options.dry and options.plot is None else ROOT / "benchmarks" / "results" / "gpu.jsonl")
    return options


def facts(dry: bool) -> dict[str, Any]:
    """What every row is of."""
    import triton as compiler

    def git(*command: str) -> str:
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git there: COMMIT says it
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or os.environ.get("COMMIT", "unknown")
    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    name = "interpreter" if dry else torch.cuda.get_device_name()
    seen = {"device": name, "torch": torch.__version__, "triton": compiler.__version__, "commit": commit + "+" * changed}
    return seen | ({"dry": True} if dry else {"cuda": torch.version.cuda})


def clocks() -> dict[str, str]:
    """The GPU's clocks right after it worked, where nvidia-smi is there to tell."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"clocks": f"{query}: {done.stdout.strip()}"} if done.returncode == 0 else {}


def times(calls: Sequence[Callable[[], object]], dry: bool) -> list[float]:
    """Microseconds per call; in a dry run one wall-clock time, which says nothing."""
    return gpu_tune.wall_times(calls) if dry else gpu_tune.graph_times(calls, 0.15)


def ceilings(device: torch.device, dry: bool) -> dict[str, float]:
    """Bytes/s of a copy, flop/s of a large bf16 product of random numbers, and the microseconds of a kernel that does nothing."""
    size, n = (1 << 10, 16) if dry else (1 << 30, 8192)
    a = torch.empty(size, dtype=torch.uint8, device=device).random_()
    b, one = torch.empty_like(a), torch.zeros(1, device=device)
    copy = statistics.median(times([partial(b.copy_, a)], dry))
    X, W = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    product = statistics.median(times([partial(torch.mm, X, W)], dry))
    nothing = statistics.median(times([partial(one.add_, 1)] * 64, dry))
    return {"bytes_s": 2 * size / copy * 1e6, "flop_s": 2 * n**3 / product * 1e6, "launch_us": nothing}


def side_car(O: int, I: int, share: float, device: torch.device) -> triton.Outliers:
    """Outliers drawn at random."""
    kept = torch.rand(O, I, device=device) < share
    counts = kept.sum(1).cumsum(0)
    indptr = torch.cat([counts.new_zeros(1), counts]).to(torch.int32)
    index = kept.nonzero()[:, 1].to(torch.int32)
    return outliers.prepare(indptr, index, torch.randn(len(index), device=device).bfloat16(), (O, I))


def weights(kind: str, O: int, I: int, device: torch.device) -> list[triton.Weight]:
    """Copies of a random weight that together exceed the caches."""
    from dataclasses import replace

    bits, share = KINDS[kind]
    count = gpu_tune.copies(O * I * bits // 8)
    made = [gpu_tune.random_weight(O, I, bits, GROUP, False, torch.bfloat16, device) for _ in range(count)]
    if share:
        made = [replace(w, outliers=side_car(O, I, share, device)) for w in made]
    return made


def held(w: triton.Weight) -> int:
    """Bytes that the kernel reads of a weight."""
    parts = [w.words, w.stats, *(w.outliers[:5] if w.outliers else ())]
    return sum(t.numel() * t.element_size() for t in parts)


def cells(options: argparse.Namespace, device: torch.device, top: dict[str, float], end: float) -> Iterator[dict[str, Any]]:
    """A row per kind, shape and number of rows of x, until `end`."""
    for kind in options.kinds:
        for O, I in options.shapes:
            if time.monotonic() > end:
                yield {"skipped": f"{kind} {O}x{I}", "why": f"{options.minutes} minutes are over"}
                continue
            ours = weights(kind, O, I, device)
            dense = [torch.randn(O, I, device=device).bfloat16() for _ in range(gpu_tune.copies(2 * O * I))]
            size = held(ours[0])
            for M in options.rows:
                x = torch.randn(M, I, device=device).bfloat16()
                y = x.new_empty(M, O)
                how = gpu_table.choose(KINDS[kind][0], GROUP, (O, I), M, device)
                theirs = statistics.median(times([partial(torch.mm, x, W.T, out=y) for W in dense], options.dry))
                seen = sorted(times([partial(triton.run, x, w, None, y, how) for w in ours], options.dry))
                us = statistics.median(seen)
                traffic, flops = size + 2 * M * (O + I), 2 * M * O * I
                floor = max(traffic / top["bytes_s"], flops / top["flop_s"]) * 1e6
                yield {
                    "kind": f"{kind} g{GROUP}", "shape": [O, I], "M": M, "dtype": "bfloat16", "path": how.path, "BM": how.BM,
                    "BN": how.BN, "split": how.split, "us": us, "p20": seen[len(seen) // 5], "p80": seen[len(seen) * 4 // 5],
                    "dense_us": theirs, "speedup": theirs / us, "or_dense": max(1.0, theirs / us),
                    "GB_s": size / us / 1e3, "TFLOP_s": flops / us / 1e6,
                    "roofline": floor / us, "roofline_less_launch": floor / max(us - top["launch_us"], 1e-9),
                }  # fmt: skip
            del ours, dense


def tune(options: argparse.Namespace, device: torch.device, name: str) -> None:
    """Measure W4's table and use it from here on."""
    beside = Path(tempfile.gettempdir()) if options.out is None else options.out.parent
    path = options.table or beside / f"gpu-{gpu_table.slug(name)}.json"
    rows = options.rows if options.dry else sorted({*options.rows, 1, 16, 64, 128, 256, 512, 1024, 4096})

    def told(row: dict[str, Any]) -> None:
        print("table:", json.dumps(row), flush=True)

    os.environ["COMPRESS_GPU_TABLE"] = str(path)
    gpu_tune.tune((4,), (GROUP,), options.tuned, rows, path, told, True, options.tune * 60, device)


def main() -> int:
    """Run; 0 if every result is right."""
    options = arguments()
    if options.plot is not None:
        from gpu_plot import plot

        print(plot(load(options.out), options.plot))
        return 0
    end = time.monotonic() + options.minutes * 60
    device = torch.device("cpu" if options.dry else "cuda")
    common = facts(options.dry)
    print(json.dumps(common), file=sys.stderr)

    def note(row: dict[str, Any]) -> None:
        if options.out is not None:
            append(options.out, {**row, **common})

    wrong = total = 0
    types = (torch.bfloat16,) if options.dry else (torch.float16, torch.bfloat16)
    for row in chain(checks(device, types, small=options.dry), model(device)):
        note(row)
        if "skipped" in row:
            print("skipped:", row["skipped"], row["why"])
            continue
        total += 1
        if not row["good"]:
            wrong += 1
            print("wrong:", json.dumps(row), flush=True)
    print(f"{total - wrong} of {total} checks are right", flush=True)
    if wrong:
        common["wrong_checks"] = wrong
    if options.tune:
        tune(options, device, common["device"])
    top = ceilings(device, options.dry)
    note({"ceilings": top, **clocks()})
    print(json.dumps(top))
    for row in decode(device, partial(times, dry=options.dry), top["bytes_s"], options.dry):
        note(row)
        print(
            f"a token of {row['decode']}, batch {row['batch']}: {row['tokens_s']:.0f} tokens/s, dense {row['dense_tokens_s']:.0f},"
            f" {row['speedup']:.2f}x, {row['roofline']:.0%} of the roofline", flush=True,
        )  # fmt: skip
    print(f"{'kind':12}{'shape':>14}{'M':>6}{'path':>9}{'us':>10}{'dense':>10}{'ratio':>7}{'roof':>6}{'less':>6}")
    for row in cells(options, device, top, end):
        note(row)
        if "skipped" in row:
            print("skipped:", row["skipped"], row["why"])
            continue
        label = "x".join(map(str, row["shape"]))
        print(
            f"{row['kind']:12}{label:>14}{row['M']:>6}{row['path']:>9}{row['us']:>10.2f}{row['dense_us']:>10.2f}{row['speedup']:>7.2f}"
            f"{row['roofline']:>6.0%}{row['roofline_less_launch']:>6.0%}", flush=True,
        )  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

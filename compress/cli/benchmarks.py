"""`compress bench kernels`, `compress bench model` and `compress bench tune`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.artifacts import Debug, Json

bench = typer.Typer(help="Time the kernels, or a model, beside dense ones.", no_args_is_help=True)


@bench.command("kernels")
def bench_kernels(
    kinds: Annotated[str, typer.Option(help="Kinds of weights, separated by commas; default all.")] = "",
    shapes: Annotated[str, typer.Option(help="Shapes OUTxIN, separated by commas; default those of an 8B and a small model.")] = "",
    rows: Annotated[str, typer.Option(help="Numbers of tokens.")] = "1,4,16,64,256",
    seconds: Annotated[float, typer.Option(help="About how long each is timed.")] = 2.0,
    threads: Annotated[int | None, typer.Option(help="Threads; default torch's.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also append the rows to this JSONL file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the speed-ups into this PNG file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Products with every kind of weight beside the dense bf16 product, cold weights, medians of interleaved runs."""
    import torch

    from compress import log, timing
    from compress.errors import CompressError

    log.configure(debug)
    if threads is not None:
        torch.set_num_threads(threads)
    tokens = _numbers("--rows", rows, "1,16")
    if min(tokens) < 1 or not seconds > 0:
        raise CompressError("--rows and --seconds must be above 0", hint="--rows 1,16 --seconds 2", usage=True)
    found = []
    if not as_json:
        print("kind           path       shape         rows        ms     dense speed-up   GB/s of peak")
    for row in timing.kernels(_split(kinds), _split(shapes), tokens, seconds):
        found.append({**row.to_dict(), "threads": torch.get_num_threads()})
        if as_json:
            print(json.dumps(found[-1]), flush=True)
        else:
            shape = "x".join(map(str, row.shape))
            print(
                f"{row.kind:14s} {row.path:10s} {shape:12s} {row.rows:5d} {row.ms:9.3f} {row.dense_ms:9.3f} {row.speedup:7.2f}x "
                f"{row.gb_s:6.1f} {row.share:6.0%}", flush=True,
            )  # fmt: skip
    if out is not None:
        with out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    if plot is not None:
        panels: dict[str, dict[str, dict[int, float]]] = {}
        for r in found:
            panels.setdefault("x".join(map(str, r["shape"])), {}).setdefault(r["kind"], {})[r["rows"]] = r["speedup"]
        draw(panels, plot)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str, example: str) -> list[int]:
    from compress.errors import CompressError

    try:
        return [int(n) for n in text.split(",")]
    except ValueError as error:
        raise CompressError(f"{option} {text!r} is no list of numbers", hint=f"{option} {example}", usage=True) from error


def draw(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path, title: str = "") -> None:
    """Write a picture of speed-ups over dense bf16, panel -> kind -> rows of x -> speed-up."""
    from compress.errors import CompressError

    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError("a plot needs matplotlib", hint="pip install matplotlib") from error
    figure = Figure(figsize=(4.5 * len(panels), 4))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, kinds) in zip(axes, panels.items(), strict=True):
        for i, (kind, points) in enumerate(kinds.items()):
            style = {"color": colormaps["tab20"](i % 20), "marker": "o", "markersize": 3, "label": kind}
            axis.plot(sorted(points), [points[n] for n in sorted(points)], **style)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_title(name)
        axis.set_xlabel("rows of x")
    axes[0].set_ylabel("speed-up over dense bf16")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@bench.command("tune")
def bench_tune(
    kinds: Annotated[str, typer.Option(help="Kinds of weights, separated by commas; default all.")] = "",
    seconds: Annotated[float, typer.Option(help="About how long the paths of a case are timed.")] = 1.0,
    threads: Annotated[int | None, typer.Option(help="Threads that the table is for; default torch's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N: whose kernels.")] = "auto",
    shapes: Annotated[str, typer.Option(help="GPU: shapes OUTxIN, separated by commas; default Llama-3-8B's.")] = "",
    group_size: Annotated[int, typer.Option(help="GPU: weights per scale; -1: one scale per row.")] = 128,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure which kernel path is the fastest here, and keep it: models that are loaded later take it.

    On a GPU: in which blocks each shape runs, for 1 to 4096 tokens, beside the dense product. q, k, v and gate, up are one shape.
    Where the C++ library is there, only paths that native decoding can take are chosen.
    """
    import dataclasses

    import torch

    from compress import devices, log, tuning

    log.configure(debug)
    where = devices.pick(device)
    if where != "cpu":
        _tune_gpu(where, _split(kinds), _split(shapes), group_size, as_json)
        return
    if threads is not None:
        torch.set_num_threads(threads)
    cases = []
    for case in tuning.tune(_split(kinds), seconds=seconds):
        cases.append(case)
        if as_json:
            print(json.dumps(dataclasses.asdict(case)), flush=True)
        else:
            times = ", ".join(f"{path} {' and '.join(f'{t:.3f}' for t in ms)}" for path, ms in case.ms.items())
            note = f" ({case.faster} would end native decoding)" if case.faster else ""
            print(f"{case.key:40s} {case.best:9s} ms with 1 and 16 tokens: {times}{note}", flush=True)
    if cases:
        print(f"kept in {tuning.keep(cases)}", file=sys.stderr)


def _tune_gpu(device: str, kinds: list[str], shapes: list[str], group: int, as_json: bool) -> None:
    from compress import timing, tuning
    from compress.errors import CompressError

    def told(row: dict[str, Any]) -> None:
        what = f"{row['bits']} bits {row['O']}x{row['I']}, {row['M']} tokens"
        line = f"{what}: {row['path']} {row['us']:.1f} us, dense {row['dense_us']:.1f}"
        print(json.dumps(row) if as_json else line, flush=True)

    if group not in (32, 64, 128, -1):
        raise CompressError(f"--group-size {group} has no kernel on a GPU", hint="use 32, 64, 128 or -1", usage=True)
    found = []
    for text in shapes:
        shape = timing.parsed_shape(text)
        if shape is None:
            raise CompressError(f"{text!r} is no shape", hint="--shapes 4096x4096,6144x4096", usage=True)
        found.append(shape)
    print(f"kept in {tuning.gpu(device, kinds, found, group, told)}", file=sys.stderr)


@bench.command("model")
def bench_model(
    model: Annotated[str, typer.Argument(help="An artifact, a model folder, or a hub id.")],
    baseline: Annotated[str | None, typer.Option(help="The dense model, timed in the same run.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 32,
    repeats: Annotated[int, typer.Option(help="Repetitions, of which the median counts.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of activations.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(help="Threads; default torch's.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Instead: where the time of one decoded token goes.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prefill and decode speed, time to the first token, and memory, each model in a process of its own."""
    from compress import log

    log.configure(debug)
    sizes = _numbers("--batches", batches, "1,8")
    options: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "dtype": dtype}
    function = "profile" if profile else "model"
    if not profile:
        options |= {"batches": sizes, "repeats": repeats}
    rows = [row for path in (baseline, model) if path is not None for row in _child(path, function, options, threads)]
    if profile:
        _print_profiles(rows, as_json)
        return
    base = {r["batch"]: r for r in rows if r["model"] == baseline}
    if not as_json:
        print(
            f"{'batch':>5s} {'prefill tok/s':>13s} {'first s':>8s} {'decode tok/s':>12s} {'weights GB':>10s} {'peak GB':>8s}  model"
        )
    for row in rows:
        if as_json:
            print(json.dumps(row))
            continue
        dense = base.get(row["batch"])
        ratio = f" ({row['decode'] / dense['decode']:.2f}x)" if dense is not None and dense is not row else ""
        print(
            f"{row['batch']:5d} {row['prefill']:13.1f} {row['first']:8.3f} {row['decode']:12.2f} {row['weights'] / 1e9:10.3f} "
            f"{row['peak'] / 1e9:8.2f}  {row['model']}{ratio}, {row['path']}"
        )


def _print_profiles(rows: list[dict[str, Any]], as_json: bool) -> None:
    if not as_json:
        print(f"{'token ms':>9s} {'kernels ms':>10s} {'rest ms':>8s} {'kernels':>8s}  path, model")
    for row in rows:
        if as_json:
            print(json.dumps(row))
        else:
            rest, share = row["token"] - row["kernels"], row["kernels"] / row["token"]
            print(f"{row['token']:9.3f} {row['kernels']:10.3f} {rest:8.3f} {share:8.0%}  {row['path']}, {row['model']}")


CHILD = """
import dataclasses, json, sys
import torch
from compress import log, timing
from compress.errors import CompressError
log.configure(False)
function, options, threads = sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
if threads:
    torch.set_num_threads(threads)
try:
    for row in getattr(timing, function)(sys.argv[1], **options):
        print(json.dumps(dataclasses.asdict(row)), flush=True)
except CompressError as error:
    print(json.dumps({"error": str(error), "hint": error.hint}))
"""


def _child(path: str, function: str, options: dict[str, Any], threads: int | None) -> list[dict[str, Any]]:
    """Rows of `timing`'s function for one model, measured in a process of its own, so that peak memory is its own."""
    import subprocess

    from compress.errors import CompressError

    args = [sys.executable, "-c", CHILD, path, function, json.dumps(options), json.dumps(threads)]
    done = subprocess.run(args, stdout=subprocess.PIPE, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        if "error" in row:
            raise CompressError(row["error"], hint=row["hint"])
    if done.returncode or not rows:
        raise CompressError(f"{path}: its process ended with code {done.returncode}", hint="its own message is above")
    return rows

"""ARMOR's fast mode against its paper mode, matrix by matrix, on real weights and inputs: loss and CPU seconds.

    python benchmarks/armor_modes.py --model out/SmolLM2-135M-Instruct [--layers model.layers.10.] [--blocks 32] [--iters 20000]
    python benchmarks/armor_modes.py --stories
    python benchmarks/pruning.py --render            # the table in docs/pruning.md

Both modes start from NoWag-P's 2:4 and minimise the same loss, which is given relative to that of a matrix of zeros. Calibration
and models as in benchmarks/pruning.py. Seconds are CPU seconds of this process (`time.process_time`), so that other work on the
machine counts little; run with OMP_NUM_THREADS=1. Paper mode ends after `--iters` or by its own rule of early stopping. Rows are
appended to benchmarks/results/armor_modes.jsonl; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonl import append, load
from quality import setting

from compress import calibration
from compress.methods import _armor, _armor_fast
from compress.methods._masks import normalise
from compress.stats import InputStats
from compress.types import Stat

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "armor_modes.jsonl"


@torch.no_grad()
def observed(what: dict[str, Any], layers: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight (O, I) and input energy (I,) of every linear whose name starts with `layers`, from a dense walk."""
    from transformers import AutoModelForCausalLM

    data = {"dataset": None, **what["data"]}
    tokenizer = calibration.load_tokenizer(what["model"])
    model = AutoModelForCausalLM.from_pretrained(what["model"], dtype=torch.float32).eval()
    vocab = model.config.vocab_size
    tokens = calibration.load(
        data["dataset"], tokenizer, nsamples=data["nsamples"], seqlen=data["seqlen"], seed=None, vocab=vocab
    ).tokens
    found: dict[str, tuple[torch.Tensor, InputStats]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(layers):
            stats = InputStats(Stat.ENERGY, module.in_features, tokens.numel(), -1)
            found[name] = (module.weight.detach(), stats)
            module.register_forward_pre_hook(lambda _, args, s=stats: s.update(args[0]))
    if not found:
        sys.exit(f"error: no linear's name starts with {layers!r}")
    for windows in tokens.split(4):
        model(windows, use_cache=False)
    return {name: (W, stats.energy()) for name, (W, stats) in found.items()}


def timed(run: Callable[[], tuple[_armor.Factors, _armor.Trace]]) -> tuple[_armor.Factors, _armor.Trace, float]:
    start = time.process_time()
    factors, trace = run()
    return factors, trace, time.process_time() - start


def measure(W: torch.Tensor, h: torch.Tensor, block: int, iters: int) -> dict[str, Any]:
    """One matrix in both modes."""
    bar = normalise(W).W
    b_out, b_in = _armor.block_size(len(W), block, 1), _armor.block_size(W.shape[1], block, 4)
    quick, _, quick_seconds = timed(lambda: _armor_fast.fast(bar, h, b_out, b_in, 2, 4, _armor_fast.Plan()))
    _, trace, seconds = timed(lambda: _armor.paper(bar, h, b_out, b_in, iters=iters))
    losses = trace["losses"]
    row = {"shape": list(W.shape), "b_out": b_out, "b_in": b_in, "overhead": b_out / W.shape[1] + b_in / len(W)}
    row |= {"nowag": trace["L0"], "paper": trace["L_best"], "iterations": len(losses), "paper_seconds": round(seconds, 1)}
    row |= {f"paper_{n}": min(losses[:n]) for n in (500, 2000, 5000) if n <= len(losses)}
    return {**row, "fast": _armor.relative_loss(quick, bar, h), "fast_seconds": round(quick_seconds, 1)}


def summary(rows: list[dict[str, Any]]) -> str:
    """The ranges of the last two columns, in a sentence."""
    losses = [r["fast"] / r["paper"] for r in rows]
    times = [r["paper_seconds"] / r["fast_seconds"] for r in rows]
    loss, time = f"{min(losses):.2f} to {max(losses):.2f}", f"1/{min(times):.0f} to 1/{max(times):.0f}"
    return f"Over all {len(rows)}: {loss} of the loss in {time} of the time."


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a table in Markdown."""
    lines = ["| | b_out, b_in | NoWag-P | paper (iterations) | CPU s | fast | CPU s | loss | time |", "| --- |" + " --- |" * 8]
    for r in rows:
        lines.append(
            f"| {r['model']} {r['linear'].removeprefix('model.layers.')} | {r['b_out']}, {r['b_in']} | {r['nowag']:.4f} | "
            f"{r['paper']:.5f} ({r['iterations']}) | {r['paper_seconds']:.0f} | {r['fast']:.5f} | {r['fast_seconds']:.1f} | "
            f"{r['fast'] / r['paper']:.2f} | 1/{r['paper_seconds'] / r['fast_seconds']:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="ARMOR's modes, matrix by matrix")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--stories", action="store_true", help="the shipped checkpoint instead")
    parser.add_argument("--layers", help="beginning of the linears' names; block 10, of --stories block 3")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32], help="largest size of the wrappers' blocks")
    parser.add_argument("--iters", type=int, default=20_000)
    args = parser.parse_args()
    what, label = setting(args.stories, args.model), "stories15M" if args.stories else "SmolLM2-135M"
    layers = args.layers or ("model.layers.3." if args.stories else "model.layers.10.")
    for name, (W, h) in observed(what, layers).items():
        for block in args.blocks:
            key = {"model": label, "linear": name, "block": block, "iters": args.iters}
            if any(key.items() <= row.items() for row in load(RESULTS)):
                continue
            row = {**key, **measure(W, h, block, args.iters)}
            append(RESULTS, row)
            print(table([row])[-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Artifacts of random weights in a real model's shape, made when they are asked for; for `decode.py` and `load_memory.py`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from random_checkpoint import SHAPES

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Made:
    """A checkpoint and its artifact."""

    dense: Path | None  # where it was asked for
    artifact: Path
    label: str


def options(parser: argparse.ArgumentParser) -> None:
    """What decides an artifact."""
    group = parser.add_argument_group("an artifact of random weights in place of one that is there")
    group.add_argument("--shape", choices=sorted(SHAPES))
    group.add_argument("--blocks", type=int, help="default: the shape's own")
    group.add_argument("--bits", type=int, default=4)
    group.add_argument("--group-size", type=int, default=128)
    group.add_argument("--head-bits", type=int, default=8, help="of embedding and head; 16: they stay bf16")
    group.add_argument("--work", type=Path, default=Path("out/shapes"), help="where it and its checkpoint are made")
    group.add_argument("--keep", action="store_true", help="leave them there, and take them if they are there")


@contextmanager
def made(args: argparse.Namespace, dense: bool) -> Iterator[Made]:
    """The artifact that the options ask for, and with `dense` its checkpoint; both are removed afterwards, unless kept."""
    blocks = args.blocks or SHAPES[args.shape]["num_hidden_layers"]
    checkpoint = args.work / f"{args.shape}-{blocks}"
    artifact = args.work / f"{checkpoint.name}-w{args.bits}g{args.group_size}h{args.head_bits}"
    try:
        if not (checkpoint / "config.json").is_file() and (dense or not artifact.is_dir()):
            shutil.rmtree(checkpoint, ignore_errors=True)
            _python("benchmarks/random_checkpoint.py", "--shape", args.shape, "--blocks", blocks, "--out", checkpoint)
        if not artifact.is_dir():
            head = [] if args.head_bits == 16 else ["--lm-head-bits", args.head_bits]
            widths = "--bits", args.bits, "--group-size", args.group_size
            _python("cli.py", "quantize", checkpoint, "-m", "rtn", *widths, *head, "-o", artifact)
        if not dense and not args.keep:
            shutil.rmtree(checkpoint, ignore_errors=True)  # the larger of the two
        yield Made(checkpoint if dense else None, artifact, _label(args, blocks))
    finally:
        if not args.keep:
            shutil.rmtree(checkpoint, ignore_errors=True)
            shutil.rmtree(artifact, ignore_errors=True)


def _label(args: argparse.Namespace, blocks: int) -> str:
    whole = SHAPES[args.shape]["num_hidden_layers"]
    part = "" if blocks == whole else f", {blocks} of {whole} blocks"
    return f"{args.shape}{part}, random weights, W{args.bits} g{args.group_size}, head {args.head_bits} bits"


def _python(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True, stdout=sys.stderr)

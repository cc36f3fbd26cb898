"""`compress eval` and `compress generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.artifacts import Debug, Json


def evaluate_model(
    model: Annotated[str, typer.Argument(help="An artifact, a model folder, or a hub id.")],
    baseline: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="A .txt file: perplexity and, with a baseline, KL divergence on its windows.")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window; default min(512, the model's context).")] = None,
    windows: Annotated[int | None, typer.Option(help="Use the first N windows only.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="lm-eval tasks; may be repeated or comma-separated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    task_dir: Annotated[Path | None, typer.Option(help="A folder of lm-eval task YAMLs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows or requests per batch.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="Use the fastest kernels instead of the exact path.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what compression cost: perplexity, KL divergence, lm-eval tasks."""
    from compress import log
    from compress.evaluation import evaluate

    log.configure(debug)
    names = tuple(n for item in tasks or () for n in item.split(",") if n)
    report = evaluate(
        model, baseline=baseline, text=text, seqlen=seqlen, windows=windows, tasks=names, limit=limit, task_dir=task_dir,
        batch_size=batch_size, device=device, fast=fast,
    )  # fmt: skip
    print(json.dumps(report.to_dict()) if as_json else report.render())


def generate_text(
    model: Annotated[str, typer.Argument(help="An artifact, a model folder, or a hub id.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    debug: Debug = False,
) -> None:
    """Continue a prompt."""
    from compress import log
    from compress.generation import stream

    log.configure(debug)
    for piece in stream(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat, device=device):
        print(piece, end="", flush=True)
    sys.stdout.write("\n")

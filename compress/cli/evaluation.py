"""`compress eval` and `compress generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.artifacts import Debug, Json
from compress.errors import CompressError


def evaluate_model(
    model: Annotated[str, typer.Argument(help="An artifact, a model folder, or a hub id.")],
    baseline: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A .txt file: perplexity and, with a baseline, KL divergence; of a bundle also TASK=FILE, repeated."),
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window; default min(512, the model's context).")] = None,
    windows: Annotated[int | None, typer.Option(help="Use the first N windows only.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="lm-eval tasks; may be repeated or comma-separated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    task_dir: Annotated[Path | None, typer.Option(help="A folder of lm-eval task YAMLs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows or requests per batch.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    task: Annotated[str | None, typer.Option(help="A bundle's task, or all.")] = None,
    base: Annotated[str | None, typer.Option(help="The bundle's base, where it lies elsewhere.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Use the fastest kernels instead of the exact path.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what compression cost: perplexity, KL divergence, lm-eval tasks."""
    from compress import log
    from compress.evaluation import evaluate

    log.configure(debug)
    names = tuple(n for item in tasks or () for n in item.split(",") if n)
    options: dict[str, Any] = {"seqlen": seqlen, "windows": windows, "tasks": names, "limit": limit}
    options |= {"task_dir": task_dir, "batch_size": batch_size}
    if (Path(model) / "bundle.json").is_file():
        _evaluate_bundle(model, task, text or [], base, baseline, device, options, as_json)
        return
    if task is not None or base is not None:
        raise CompressError(f"{model}: not a bundle", hint="leave out --task and --base; --tasks names lm-eval tasks", usage=True)
    if len(text or ()) > 1:
        raise CompressError("one --text is enough", hint="several are for a bundle's tasks", usage=True)
    report = evaluate(model, baseline=baseline, text=text[0] if text else None, device=device, fast=fast, **options)
    print(json.dumps(report.to_dict()) if as_json else report.render())


def _evaluate_bundle(
    model: str, task: str | None, text: list[str], base: str | None, baseline: str | None, device: str, options: dict[str, Any],
    as_json: bool,
) -> None:  # fmt: skip
    from compress.cli.bundles import pairs
    from compress.evaluation.bundles import evaluate_tasks

    if task is None:
        raise CompressError(f"{model}: a bundle", hint="--task NAME, or --task all", usage=True)
    texts: Any = text[0] if len(text) == 1 and "=" not in text[0] else pairs(text, "--text")
    names = None if task == "all" else [task]
    reports = evaluate_tasks(model, names, base=base, text=texts, baseline=baseline, device=device, **options)
    if as_json:
        print(json.dumps({name: report.to_dict() for name, report in reports.items()}))
    else:
        print("\n\n".join(report.render() for report in reports.values()))


def generate_text(
    model: Annotated[str, typer.Argument(help="An artifact, a model folder, or a hub id.")],
    prompt: Annotated[list[str], typer.Option(help="The text to continue; of a bundle it may be repeated, for one batch.")],
    task: Annotated[list[str] | None, typer.Option(help="A bundle's task: one for all prompts, or one each.")] = None,
    base: Annotated[str | None, typer.Option(help="The bundle's base, where it lies elsewhere.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    debug: Debug = False,
) -> None:
    """Continue a prompt; of a bundle, several prompts of different tasks in one batch."""
    from compress import log
    from compress.generation import batch, stream

    log.configure(debug)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
    if len(prompt) > 1:
        for name, text in zip(task or [], batch(model, prompt, task or [], base=base, device=device, **options), strict=False):
            print(f"[{name}] {text}")
        return
    if len(task or ()) > 1:
        raise CompressError(f"{len(task or ())} tasks for one prompt", hint="one --prompt for each --task", usage=True)
    for piece in stream(model, prompt[0], task=task[0] if task else None, base=base, device=device, **options):
        print(piece, end="", flush=True)
    sys.stdout.write("\n")

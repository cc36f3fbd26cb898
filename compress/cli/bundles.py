"""`compress bundle`, `merge` and `extract`, and what `inspect` prints of a bundle."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import registry
from compress.cli.compression import _option, _parameter, parse_size, size
from compress.errors import CompressError

DEFAULT = {"bundle": "tallmask", "merge": "consensus"}  # verb -> the method that runs where none is named
_COMMON: dict[str, tuple[Any, Any]] = {
    "base": (Annotated[str, typer.Argument(help="The base: a model folder, or a hub id.")], inspect.Parameter.empty),
    "finetunes": (
        Annotated[list[str], typer.Argument(help="Fine-tunes of it: FOLDER or NAME=FOLDER; PEFT LoRA folders are merged on read.")],
        inspect.Parameter.empty,
    ),
    "method": (Annotated[str, typer.Option("-m", "--method", help="The method; `compress methods` lists them.")], ""),
    "out": (Annotated[Path | None, typer.Option("-o", "--out", help="Where the result goes.")], None),
    "validation": (
        Annotated[list[str] | None, typer.Option(help="NAME=FILE, each task's text, by whose loss lambda and alpha are chosen.")],
        None,
    ),
    "validation_windows": (Annotated[int, typer.Option(help="Windows of each such text.")], 64),
    "seqlen": (Annotated[int | None, typer.Option(help="Tokens per window; default min(512, the model's context).")], None),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")], "auto"),
    "ignore": (Annotated[list[str] | None, typer.Option(help="Leave a tensor out: full name or 're:…'; may be repeated.")], None),
    "work_dir": (Annotated[Path | None, typer.Option(help="Work folder, kept with report.jsonl; default OUT.partial.")], None),
    "restart": (Annotated[bool, typer.Option("--restart", help="Discard unfinished work or an older result.")], False),
    "max_shard_size": (Annotated[str, typer.Option(help="Largest weight file, such as 5GB.")], "5GB"),
    "json": (Annotated[bool, typer.Option("--json", help="Print the result as JSON.")], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks and more log.")], False),
}
_OWN: dict[str, dict[str, tuple[Any, Any]]] = {
    "bundle": {"include_base": (Annotated[bool, typer.Option("--include-base", help="Copy the base into the bundle.")], False)},
    "merge": {},
}
_ABOUT = {
    "bundle": "Many fine-tunes of one base in one artifact: a shared vector, and one bit per weight and task.",
    "merge": "Merge fine-tunes of one base into one ordinary checkpoint.",
}


def command(verb: str, method: str | None) -> Callable[..., None]:
    """A function whose signature Typer reads: the common options, and, for a chosen method, its own."""
    names = registry.methods(verb)
    config = None
    if method is not None:
        module = registry.load("methods", method)
        if registry.verb(method) != verb:
            why = f"{method} is a method of compress {registry.verb(method)}"
            raise CompressError(why, hint=f"methods of {verb}: {', '.join(names)}", usage=True)
        config = module.Config
    shared = {**_COMMON, "method": (_COMMON["method"][0], DEFAULT[verb]), **_OWN[verb]}
    parameters = [_parameter(name, annotation, default) for name, (annotation, default) in shared.items()]
    fields = dataclasses.fields(config) if config is not None else ()
    if config is not None:
        hints = typing.get_type_hints(config)
        parameters += [_parameter(f.name, Annotated[hints[f.name], _option(f, hints[f.name])], f.default) for f in fields]
    own = {f.name for f in fields}

    def run(**values: Any) -> None:
        options = {k: v for k, v in values.items() if k in own}
        _run(verb, {k: v for k, v in values.items() if k not in own}, options)

    listing = "\n".join(f"  {n:15s} {registry.summary('methods', n)}" for n in names)
    which = f"Options of {method} are below." if method else "Add -m NAME to see that method's options."
    run.__doc__ = f"{_ABOUT[verb]}\n\n\b\nMethods:\n{listing}\n\n{which}"
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def pairs(items: Sequence[str] | None, option: str) -> dict[str, str] | None:
    """{name: file} of NAME=FILE arguments."""
    found: dict[str, str] = {}
    for item in items or ():
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise CompressError(f"{option} {item!r} is not NAME=FILE", hint=f"such as {option} code=valid.txt", usage=True)
        if name in found:
            raise CompressError(f"{option} names {name} twice", hint="one file per task", usage=True)
        found[name] = path
    return found or None


def _run(verb: str, common: dict[str, Any], options: dict[str, Any]) -> None:
    from compress import log

    log.configure(common.pop("debug"))
    as_json, out = common.pop("json"), common.pop("out")
    if out is None:
        raise CompressError("where to?", hint="-o OUT names the folder of the result", usage=True)
    common["max_shard_size"] = parse_size(common["max_shard_size"])
    common["validation"] = pairs(common["validation"], "--validation")
    common["ignore"] = tuple(common["ignore"] or ())
    base, tunes, resume = common.pop("base"), common.pop("finetunes"), not common.pop("restart")
    if verb == "bundle":
        from compress.bundling import bundle

        report: Any = bundle(base, tunes, out, resume=resume, progress=_progress, **common, **options)
    else:
        from compress.merging import merge

        report = merge(base, tunes, out, resume=resume, progress=_progress, **common, **options)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "path": str(report.path)}))
    else:
        _print_bundle(report) if verb == "bundle" else _print_merge(report)


def _print_bundle(r: Any) -> None:
    share, whole = r.bytes / r.bytes_separate, r.bytes_base + r.bytes_separate
    print(
        f"{r.path}: {len(r.tasks)} tasks, {size(r.bytes)} of weights (shared {size(r.bytes_shared)}, tasks {size(r.bytes_tasks)}), "
        f"{share:.1%} of the separate checkpoints; with the base {(r.bytes + r.bytes_base) / whole:.1%}; {r.seconds:.0f} s"
    )
    for name, error in r.tasks.items():
        lam = r.lambdas[name]
        print(f"  {name:20s} error {error:.4f}" + ("" if lam is None else f"  lambda {lam:g}"))


def _print_merge(r: Any) -> None:
    print(f"{r.path}: {len(r.tasks)} fine-tunes merged, alpha {r.alpha:g}, {size(r.bytes)}, {r.seconds:.0f} s")
    for name, row in r.tasks.items():
        parts = [f"lambda {row['lambda']:g}"] if row.get("lambda") is not None else []
        parts += [f"loss {row['loss']:.4f} (fine-tune {row['own']:.4f})"] if "loss" in row else []
        if parts:
            print(f"  {name:20s} " + "  ".join(parts))


def _progress(p: Any) -> None:
    left = f"{p.left / 60:.1f} min left" if p.left >= 90 else f"{p.left:.0f} s left"
    error = "" if p.error is None else f"error {p.error:.4f}  "
    line = f"tensor {p.block + 1:4d}/{p.blocks}  {error}{p.seconds:5.1f} s  {left}  rss {size(p.rss)}  {p.what}"
    print(line, file=sys.stderr, flush=True)


def extract_task(
    path: Annotated[Path, typer.Argument(help="A bundle.")],
    task: Annotated[str, typer.Option(help="The task.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the checkpoint goes.")],
    base: Annotated[str | None, typer.Option(help="The bundle's base, where it lies elsewhere.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work or an older result.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 5GB.")] = "5GB",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and more log.")] = False,
) -> None:
    """Make one task of a bundle an ordinary checkpoint again."""
    from compress import log
    from compress.extracting import extract

    log.configure(debug)
    made = extract(path, task, out, base=base, resume=not restart, max_shard_size=parse_size(max_shard_size))
    print(f"{made}: task {task}, an ordinary checkpoint")


def print_bundle(folder: Path, as_json: bool) -> None:
    """`compress inspect` of a bundle."""
    from compress.bundle_audit import describe

    d = describe(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(d)))
        return
    print(f"{folder}: {len(d.tasks)} fine-tunes of {d.base}, {d.method}")
    print("  settings   " + ", ".join(f"{k}={v}" for k, v in d.config.items()))
    print(f"  base       {'included' if d.included else 'referenced by hash'}, {size(d.bytes_base)}")
    print(f"  shared     {d.shared}, {size(d.bytes_shared)} for {d.parameters / 1e6:.1f}M parameters; bits are {d.bits}s")
    for name, t in d.tasks.items():
        lam = "" if t.lam is None else f", lambda {t.lam:g}"
        counts = f"{t.masked} tensors masked ({t.coded} coded), {t.whole} whole, {t.base} the base's"
        print(f"  {name + ':':12s} error {t.error:.4f}{lam}, {size(t.bytes)}: {counts}")
        for tensor, error in t.worst:
            print(f"               {error:.4f}  {tensor}" + ("  worse than the base" if error > 1 else ""))
    print(
        f"  size       {size(d.bytes)} without the base, {d.bytes / d.bytes_separate:.1%} of the separate checkpoints; with it "
        f"{(d.bytes + d.bytes_base) / (d.bytes_separate + d.bytes_base):.1%}"
    )
    print("  loads")
    for who, answer in d.where:
        print(f"    {who + ':':14s} {answer}")
    for name, report in ((d.report or {}).get("tasks") or {}).items():
        for metric in report["metrics"]:
            beside = "" if metric["baseline"] is None else f"   baseline {metric['baseline']:.4f}"
            print(f"  {name} {metric['name'] + ':':20s} {metric['value']:.4f}{beside}")

"""`compress quantize`: common options, and the fields of the chosen method's Config as further options."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import registry
from compress.errors import CompressError

DEFAULT_METHOD = "awq"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_COMMON: dict[str, tuple[Any, Any]] = {
    "model": (Annotated[str, typer.Argument(help="A model folder, or a hub id such as org/name.")], inspect.Parameter.empty),
    "method": (Annotated[str, typer.Option("-m", "--method", help="The method; `compress methods` lists them.")], DEFAULT_METHOD),
    "out": (Annotated[Path | None, typer.Option("-o", "--out", help="Where the artifact goes; needed but for --dry-run.")], None),
    "dataset": (
        Annotated[str | None, typer.Option(help=".txt, .jsonl, .parquet, folder, or hub name[:config][:split]; default: ours.")],
        None,
    ),
    "nsamples": (Annotated[int, typer.Option(help="Calibration windows.")], 128),
    "seqlen": (Annotated[int | None, typer.Option(help="Tokens per window; default min(512, the model's context).")], None),
    "seed": (Annotated[int | None, typer.Option(help="Choose windows at random; default: the first ones.")], None),
    "batch_size": (Annotated[int | None, typer.Option(help="Windows per batch; default: about 1024 tokens.")], None),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")], "auto"),
    "format": (Annotated[str, typer.Option(help="pack-quantized, awq (4-bit gemm, for vLLM) or dense.")], "pack-quantized"),
    "ignore": (Annotated[list[str] | None, typer.Option(help="Leave a linear dense: full name or 're:…'; may be repeated.")], None),
    "layer_config": (
        Annotated[list[str] | None, typer.Option(help="Bits of a linear's own: NAME=BITS or 're:…=BITS'; may be repeated.")],
        None,
    ),
    "target_bpw": (
        Annotated[float | None, typer.Option(help="Choose each linear's bits: least loss within so many bits per weight.")],
        None,
    ),
    "states": (Annotated[str, typer.Option(help="Calibration states in ram or on disk; auto: disk above 4 GiB.")], "auto"),
    "work_dir": (Annotated[Path | None, typer.Option(help="Work folder, kept with report.jsonl; default OUT.partial.")], None),
    "restart": (Annotated[bool, typer.Option("--restart", help="Discard unfinished work or an older result.")], False),
    "max_shard_size": (Annotated[str, typer.Option(help="Largest weight file, such as 5GB.")], "5GB"),
    "trust_remote_code": (Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")], False),
    "dry_run": (Annotated[bool, typer.Option("--dry-run", help="Predict size, memory and time; read no weight.")], False),
    "json": (Annotated[bool, typer.Option("--json", help="Print the result as JSON.")], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks and more log.")], False),
}  # fmt: skip


def quantize_command(method: str | None) -> Callable[..., None]:
    """A function whose signature Typer reads: the common options and, for a chosen method, its own."""
    names = registry.names("methods")
    config = registry.load("methods", method).Config if method is not None else None
    parameters = [_parameter(name, annotation, default) for name, (annotation, default) in _COMMON.items()]
    fields = dataclasses.fields(config) if config is not None else ()
    if config is not None:
        hints = typing.get_type_hints(config)
        parameters += [_parameter(f.name, Annotated[hints[f.name], _option(f, hints[f.name])], f.default) for f in fields]
    own = {f.name for f in fields}

    def run(**values: Any) -> None:
        _quantize({k: v for k, v in values.items() if k not in own}, {k: v for k, v in values.items() if k in own})

    listing = "\n".join(f"  {n:8s} {registry.summary('methods', n)}" for n in names)
    which = f"Options of {method} are below." if method else "Add -m NAME to see that method's options."
    run.__doc__ = f"Quantize a Hugging Face checkpoint.\n\n\b\nMethods:\n{listing}\n\n{which}"
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _option(field: dataclasses.Field[Any], hint: Any) -> Any:
    flag = field.name.replace("_", "-")
    if hint is bool:
        other = "asymmetric" if flag == "symmetric" else f"no-{flag}"
        return typer.Option(f"--{flag}/--{other}", help=field.metadata["help"])
    return typer.Option(f"--{flag}", help=field.metadata["help"])


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 123456."""
    value = text.strip().upper()
    for unit in sorted(_UNITS, key=len, reverse=True):
        if value.endswith(unit):
            number, factor = value.removesuffix(unit), _UNITS[unit]
            break
    else:
        number, factor = value, 1
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise CompressError(f"--max-shard-size {text!r} is not a size", hint="such as 5GB or 500MB", usage=True)
    return size


def _quantize(common: dict[str, Any], options: dict[str, Any]) -> None:
    from compress import fit, log

    log.configure(common.pop("debug"))
    as_json, dry, out = common.pop("json"), common.pop("dry_run"), common.pop("out")
    common["max_shard_size"] = parse_size(common["max_shard_size"])
    for name in ("ignore", "layer_config"):
        common[name] = tuple(common[name] or ())
    model, method = common.pop("model"), common.pop("method")
    resume = not common.pop("restart")
    if dry:
        skip = ("dataset", "seed", "work_dir")
        _print_estimate(fit.dry_run(model, method, **{k: v for k, v in common.items() if k not in skip}, **options), as_json)
        return
    if out is None:
        raise CompressError("where to?", hint="-o OUT names the folder of the artifact", usage=True)
    report = fit.quantize(model, method, out, resume=resume, progress=_progress, **common, **options)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "path": str(report.path)}))
        return
    ratio = report.source_bytes / report.bytes
    print(
        f"{report.path}: {report.linears} linears at {report.bits_per_weight:.2f} bits per weight, {size(report.bytes)} "
        f"({ratio:.2f}x smaller), mean error {report.mean_error:.4f}, {report.seconds:.0f} s"
    )


def size(count: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _progress(p: Any) -> None:
    left = f"{p.left / 60:.1f} min left" if p.left >= 90 else f"{p.left:.0f} s left"
    what = "gradients" if p.error is None else f"error {p.error:.4f}  {p.bits:.2f} bits"
    line = f"block {p.block + 1:3d}/{p.blocks}  {what}  {p.seconds:5.1f} s  {left}  rss {size(p.rss)}"
    print(line, file=sys.stderr, flush=True)


def _print_estimate(e: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(e)))
        return
    ratio, sure = e.source_bytes / e.artifact_bytes, "exact" if e.exact else "about"
    print(f"artifact   {size(e.artifact_bytes)} of weights, {ratio:.2f}x smaller ({sure})")
    print(f"bits       {e.bits_per_weight:.3f} per compressed weight")
    print(f"memory     about {size(e.peak_memory)} at the peak")
    print(f"time       about {e.seconds / 60:.1f} min on this machine" if e.seconds > 90 else f"time       about {e.seconds:.0f} s")

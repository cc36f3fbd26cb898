"""`compress quantize`, `prune` and `factorize`: common options, and the fields of the chosen method's Config as further options."""

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

DEFAULT = {"quantize": "awq", "prune": "sparsegpt", "factorize": "lost"}  # verb -> the method that runs where none is named
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_COMMON: dict[str, tuple[Any, Any]] = {
    "model": (Annotated[str, typer.Argument(help="A model folder, or a hub id such as org/name.")], inspect.Parameter.empty),
    "method": (Annotated[str, typer.Option("-m", "--method", help="The method; `compress methods` lists them.")], ""),
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
    "ignore": (Annotated[list[str] | None, typer.Option(help="Leave a linear dense: full name or 're:…'; may be repeated.")], None),
    "states": (Annotated[str, typer.Option(help="Calibration states in ram or on disk; auto: disk above 4 GiB.")], "auto"),
    "work_dir": (Annotated[Path | None, typer.Option(help="Work folder, kept with report.jsonl; default OUT.partial.")], None),
    "restart": (Annotated[bool, typer.Option("--restart", help="Discard unfinished work or an older result.")], False),
    "max_shard_size": (Annotated[str, typer.Option(help="Largest weight file, such as 5GB.")], "5GB"),
    "trust_remote_code": (Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")], False),
    "dry_run": (Annotated[bool, typer.Option("--dry-run", help="Predict size, memory and time; read no weight.")], False),
    "json": (Annotated[bool, typer.Option("--json", help="Print the result as JSON.")], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks and more log.")], False),
}  # fmt: skip
_HEAD: dict[str, tuple[Any, Any]] = {
    "lm_head_bits": (Annotated[int | None, typer.Option(help="Also round embedding and head, to 8 or 4 bits.")], None),
    "lm_head_only": (Annotated[bool, typer.Option("--lm-head-only", help="Of them leave an untied embedding as it is.")], False),
}  # fmt: skip
_OWN: dict[str, dict[str, tuple[Any, Any]]] = {  # of one verb
    "quantize": {
        "format": (Annotated[str, typer.Option(help="pack-quantized, awq (4-bit gemm, for vLLM) or dense.")], "pack-quantized"),
        "layer_config": (
            Annotated[list[str] | None, typer.Option(help="Bits of a linear's own: NAME=BITS or 're:…=BITS'; may be repeated.")],
            None,
        ),
        "target_bpw": (
            Annotated[float | None, typer.Option(help="Choose each linear's bits: least loss within so many bits per weight.")],
            None,
        ),
        **_HEAD,
        "keep_zeros": (
            Annotated[bool, typer.Option("--keep-zeros", help="Zeros stay zeros, as they do by themselves in what prune wrote.")],
            False,
        ),
    },
    "prune": {
        "format": (Annotated[str, typer.Option(help="sparse (zeros take no space) or dense (for any loader).")], "sparse"),
        "domain_dataset": (Annotated[str | None, typer.Option(help="Text of the domain, as --dataset (dpruner).")], None),
        "of_model": (Annotated[bool, typer.Option("--of-model", help="--sparsity is of the whole model, not its linears.")], False),
        "then_bits": (Annotated[int | None, typer.Option(help="Then quantize to so many bits, zeros kept.")], None),
        "then_method": (Annotated[str, typer.Option(help="Method of --then-bits.")], "gptq"),
        "then_group_size": (Annotated[int, typer.Option(help="Group size of --then-bits; -1: a whole row.")], 128),
        **_HEAD,
    },
    "factorize": {
        "format": (Annotated[str, typer.Option(help="factors (thin matrices and columns) or dense (for any loader).")], "factors"),
        **_HEAD,
    },
}  # fmt: skip
_ABOUT = {
    "quantize": "Quantize a Hugging Face checkpoint, or what prune wrote.",
    "prune": "Prune a Hugging Face checkpoint: zeros in a format that is smaller.",
    "factorize": "Factorize a Hugging Face checkpoint: thin factors, and whole columns beside them.",
}


def command(verb: str, method: str | None) -> Callable[..., None]:
    """A function whose signature Typer reads: the common options, the verb's, and, for a chosen method, its own."""
    names = registry.methods(verb)
    if method is not None and method.replace("-", "_").lower() in names:
        config = registry.load("methods", method).Config
    elif method is not None:
        registry.load("methods", method)  # refuses a name that no verb has
        other = registry.verb(method)
        raise CompressError(f"{method} is a method of compress {other}", hint=f"compress {other} MODEL -m {method}", usage=True)
    else:
        config = None
    shared = {**_COMMON, "method": (_COMMON["method"][0], DEFAULT[verb]), **_OWN[verb]}
    parameters = [_parameter(name, annotation, default) for name, (annotation, default) in shared.items()]
    fields = dataclasses.fields(config) if config is not None else ()
    if config is not None:
        hints = typing.get_type_hints(config)
        for f in fields:
            parameters.append(_parameter(f.name, Annotated[hints[f.name], _option(f, hints[f.name])], f.default))
    own = {f.name for f in fields}

    def run(**values: Any) -> None:
        _run(verb, {k: v for k, v in values.items() if k not in own}, {k: v for k, v in values.items() if k in own})

    listing = "\n".join(f"  {n:9s} {registry.summary('methods', n)}" for n in names)
    which = f"Options of {method} are below." if method else "Add -m NAME to see that method's options."
    run.__doc__ = f"{_ABOUT[verb]}\n\n\b\nMethods:\n{listing}\n\n{which}"
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


def _run(verb: str, common: dict[str, Any], options: dict[str, Any]) -> None:
    from compress import fit, log

    log.configure(common.pop("debug"))
    as_json, dry, out = common.pop("json"), common.pop("dry_run"), common.pop("out")
    common["max_shard_size"] = parse_size(common["max_shard_size"])
    model, method = common.pop("model"), common.pop("method")
    resume = not common.pop("restart")
    if dry:
        skip = ("dataset", "seed", "work_dir")
        rest = {k: v for k, v in common.items() if k not in skip}
        _print_estimate(fit.dry_run(model, method, verb=verb, **rest, **options), as_json)
        return
    if out is None:
        raise CompressError("where to?", hint="-o OUT names the folder of the artifact", usage=True)
    report = getattr(fit, verb)(model, method, out, resume=resume, progress=_progress, **common, **options)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "path": str(report.path)}))
        return
    ratio = report.source_bytes / report.bytes
    kept = "" if report.kept is None else f", {report.kept:.2%} of their parameters"
    zeros = "" if report.zeros is None else f", {report.zeros:.2%} zeros ({report.zeros_model:.2%} of the model)"
    print(
        f"{report.path}: {report.linears} linears at {report.bits_per_weight:.2f} bits per weight{kept}{zeros}, "
        f"{size(report.bytes)} ({ratio:.2f}x smaller), mean error {report.mean_error:.4f}, {report.seconds:.0f} s"
    )


def size(count: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _progress(p: Any) -> None:
    left = f"{p.left / 60:.1f} min left" if p.left >= 90 else f"{p.left:.0f} s left"
    what = p.what if p.error is None else f"error {p.error:.4f}  {p.bits:.2f} bits"
    unit = "step" if p.what == "training" else "block"
    line = f"{unit} {p.block + 1:3d}/{p.blocks}  {what}  {p.seconds:5.1f} s  {left}  rss {size(p.rss)}"
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

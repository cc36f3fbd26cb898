"""`compress inspect` and `compress verify`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.compression import size
from compress.errors import CompressError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and more log.")]


def inspect_artifact(
    artifact: Annotated[Path, typer.Argument(help="A folder that compress wrote.")],
    explain: Annotated[bool, typer.Option("--explain", help="Load it, and say which kernel path each linear takes here.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what an artifact is: method, bits, size, worst linears, and where it loads."""
    if explain:
        _explain(artifact, as_json)
        return
    if (artifact / "bundle.json").is_file():
        from compress.cli.bundles import print_bundle

        print_bundle(artifact, as_json)
        return
    from compress.audit import describe

    d = describe(artifact)
    if as_json:
        print(json.dumps(dataclasses.asdict(d)))
        return
    changed = ", ".join(f"{k}={v}" for k, v in d.config.items())
    print(f"{artifact}: {d.name}, {d.method}, format {d.format}")
    print(f"  settings   {changed}")
    if d.pruned:
        amount = d.pruned["config"].get("pattern") or f"{d.pruned['config'].get('sparsity') or 0.5:.4g}"
        print(f"  pruned     before, by {d.pruned['method']}, {amount}")
    if d.linears:
        print(f"  linears    {d.linears} at {d.bits_linears:.3f} bits per weight")
    for head in d.heads:
        saved = f"{size(head['bytes'])} instead of {size(head['bytes_at_16_bits'])} at 16 bits"
        print(f"  head       {head['name']} at {head['bits']} bits, error {head['error']:.4f}, {saved}")
    for part, counts in d.widths.items():
        print(f"               {part}: " + ", ".join(f"{n} at {bits} bits" for bits, n in sorted(counts.items())))
    if d.kept is not None:
        print(f"  factors    {d.kept:.2%} of the linears' parameters")
        for part, (low, high, few, many) in d.factors.items():
            print(f"               {part}: rank {low} to {high}, {few} to {many} columns")
    if d.zeros:
        pattern = f" ({', '.join(d.patterns)}; verify checks every group)" if d.patterns else ""
        ranges = (f"{part} {_span(low, high)}" for part, (low, high) in d.zeros.items())
        print(f"  zeros      {', '.join(ranges)}{pattern}")
    print(
        f"  model      {d.parameters / 1e6:.1f}M parameters at {d.bits_model:.3f} bits per weight with embeddings, {size(d.bytes)}"
    )
    if d.source_bytes:
        print(f"  original   {size(d.source_bytes)}: {d.source_bytes / d.bytes:.2f}x smaller")
    if d.linears:
        print(f"  error      mean {d.mean_error:.4f} (relative, weights); worst:")
    for name, error in d.worst:
        print(f"               {error:.4f}  {name}")
    gains = [m["loss"] / m["rtn_loss"] for row in d.search for m in row.get("scales", []) if m["rtn_loss"] > 0]
    if gains:
        print(f"  search     output error {sum(gains) / len(gains):.3f}x of plain rounding, on average over {len(gains)} searches")
    print("  loads")
    for who, answer in d.where:
        print(f"    {who + ':':14s} {answer}")
    for metric in (d.report or {}).get("metrics", []):
        beside = "" if metric["baseline"] is None else f"   baseline {metric['baseline']:.4f}"
        print(f"  {metric['name'] + ':':20s} {metric['value']:.4f}{beside}")


def _explain(artifact: Path, as_json: bool) -> None:
    """The paths that the artifact's linears take on this machine, and why not others."""
    from compress.audit import explain

    facts, choices = explain(artifact)
    if as_json:
        print(json.dumps({**facts, "choices": [dataclasses.asdict(c) for c in choices]}))
        return
    print(f"{facts['cpu']}, {facts['isa']}, {facts['threads']} threads, activations {facts['activations']}")
    print(f"paths measured here: {facts['table'] if facts['tuned'] else 'none, so the usual order holds (compress bench tune)'}")
    print(f"decoding: {facts['decoding']}")
    for choice in choices:
        more = f" and {len(choice.linears) - 1} more" if len(choice.linears) > 1 else ""
        print(f"  {choice.path:10s} {choice.linears[0]}{more}: {choice.what}")
        for path, why in choice.others.items():
            print(f"             not {path}: {why}")


def _span(low: float, high: float) -> str:
    """A share of zeros, or its range over the blocks."""
    return f"{low:.2%}" if high - low < 1e-4 else f"{low:.2%} to {high:.2%}"


def verify_artifact(
    artifact: Annotated[Path, typer.Argument(help="A folder that compress wrote.")],
    deep: Annotated[bool, typer.Option("--deep", help="Dequantize every linear and compare it with the source.")] = False,
    source: Annotated[str | None, typer.Option(help="The source checkpoint, for --deep; of a bundle its base.")] = None,
    finetune: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER, a bundle's fine-tunes for --deep.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check an artifact: hashes, tensors, finite values; with --deep against the source."""
    bundle = (artifact / "bundle.json").is_file()
    if deep and source is None:
        raise CompressError("--deep compares with the source checkpoint", hint="add --source MODEL", usage=True)
    problems = _bundle_problems(artifact, deep, source, finetune) if bundle else _problems(artifact, deep, source)
    if as_json:
        print(json.dumps({"ok": not problems, "problems": problems}))
    elif not problems:
        print(f"{artifact}: whole and consistent" + (", and equal to what the source gives" if deep else ""))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CompressError(f"{artifact}: {problems[0]}{more}", hint="copy the artifact again, or make it again with --restart")


def _problems(artifact: Path, deep: bool, source: str | None) -> list[str]:
    from compress.audit import verify, verify_deep

    problems = verify(artifact)
    return verify_deep(artifact, source) if not problems and deep and source is not None else problems


def _bundle_problems(artifact: Path, deep: bool, source: str | None, finetune: list[str] | None) -> list[str]:
    from compress.bundle_audit import verify, verify_deep
    from compress.cli.bundles import pairs

    tunes = pairs(finetune, "--finetune")
    if deep and not tunes:
        raise CompressError("--deep compares with the fine-tunes", hint="add --finetune NAME=FOLDER", usage=True)
    problems = verify(artifact, source)
    return verify_deep(artifact, source, tunes) if not problems and deep and source is not None and tunes else problems

"""Assembles the Typer application; imports no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from compress import registry
from compress.cli import HELP, bundles
from compress.cli.artifacts import inspect_artifact, verify_artifact
from compress.cli.benchmarks import bench
from compress.cli.compression import DEFAULT, command
from compress.cli.evaluation import evaluate_model, generate_text


def build(args: list[str]) -> typer.Typer:
    """The application; `args` are looked at only to find the method whose options its verb shall show."""
    app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_root)
    for verb in DEFAULT:
        app.command(verb)(command(verb, _method(args, verb)))
    for verb in bundles.DEFAULT:
        app.command(verb)(bundles.command(verb, _method(args, verb)))
    app.command("extract")(bundles.extract_task)
    app.command("inspect")(inspect_artifact)
    app.command("verify")(verify_artifact)
    app.command("eval")(evaluate_model)
    app.command("generate")(generate_text)
    app.add_typer(bench, name="bench")
    app.command("methods")(methods)
    return app


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"llm-compress {installed('llm-compress')}")
        raise typer.Exit


def methods() -> None:
    """List the methods, by the command that runs them."""
    for verb in (*DEFAULT, *bundles.DEFAULT):
        print(f"compress {verb}")
        for name in registry.methods(verb):
            print(f"  {name:12s} {registry.summary('methods', name)}")


def _method(args: list[str], verb: str) -> str | None:
    """The value of -m / --method if `verb` is called; its default one unless only its help is asked for."""
    if verb not in args[:1]:
        return None
    for i, arg in enumerate(args):
        if arg in ("-m", "--method"):
            return args[i + 1] if i + 1 < len(args) else None
        for prefix in ("--method=", "-m="):
            if arg.startswith(prefix):
                return arg.removeprefix(prefix)
        if arg.startswith("-m") and len(arg) > 2:
            return arg[2:]
    return None if "--help" in args else {**DEFAULT, **bundles.DEFAULT}[verb]

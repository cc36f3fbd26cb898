"""Write docs/cli.md from the command line's own `--help` texts; with --check, only say whether the page is up to date.

    python docs/generate_cli.py [--check]

The check compares words, options and defaults. Line breaks and metavars (`<path>`, `PATH`) are Typer's and differ between its
versions, so they are left out of it.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Made from `--help` by `python docs/generate_cli.py`; do not edit. `_` and `-` are both accepted in option names. stdout carries
results, stderr everything else. Exit codes: 0 done, 1 our error, 2 usage, 130 interrupted.
"""
VERBS = (
    "quantize", "prune", "factorize", "bundle", "merge", "extract", "inspect", "verify", "eval", "generate", "bench", "methods",
)  # fmt: skip
METAVAR = re.compile(r"^  \w+ <\w+>|<[\w\[\], ]+>|\{\w+\}|\b(TEXT|INTEGER|FLOAT|PATH|MODEL|ARTIFACT)\b", re.MULTILINE)


def help_text(*args: str) -> str:
    """What `compress ARGS --help` prints, 80 columns wide."""
    from compress.cli import main

    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        main([*args, "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def options(text: str) -> dict[str, str]:
    """The paragraphs of a help text's `Options:`, by their first line up to the help."""
    paragraphs = re.split(r"\n(?=  -)", text[text.index("Options:") :])[1:]
    return {p.split("\n")[0].split("  ")[1]: p for p in paragraphs}


def own_options(verb: str, method: str) -> str:
    """The options that only this method has."""
    text, common = help_text(verb, "-m", method), options(help_text(verb))
    return "\n".join(p for name, p in options(text).items() if name not in common)


def page() -> str:
    """The whole page."""
    from compress import registry

    parts = [HEAD, _section("compress", help_text())]
    for verb in VERBS:
        parts.append(_section(f"compress {verb}", help_text(verb)))
        if verb in ("quantize", "prune", "factorize", "bundle", "merge"):
            parts += [_section(f"compress {verb} -m {name}", own_options(verb, name), 3) for name in registry.methods(verb)]
        if verb == "bench":
            parts += [_section(f"compress bench {name}", help_text("bench", name), 3) for name in ("kernels", "tune", "model")]
    return "\n".join(parts)


def _section(title: str, text: str, level: int = 2) -> str:
    return f"{'#' * level} {title}\n\n```\n{text}\n```\n"


def _words(text: str) -> list[str]:
    return re.sub(r"-\s+", "-", METAVAR.sub("", text.replace("\\", ""))).split()


def main() -> None:
    """Write or check the page."""
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    check = bool(sys.argv[1:])
    os.environ["COLUMNS"] = "80"
    sys.argv[:] = ["compress"]  # the name that the usage line shows
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        return
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if _words(old) != _words(text):
        sys.stderr.writelines(difflib.unified_diff(old.splitlines(True), text.splitlines(True), "docs/cli.md", "--help"))
        sys.exit("error: docs/cli.md is out of date\nhint: run python docs/generate_cli.py")


if __name__ == "__main__":
    main()

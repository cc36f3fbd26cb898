"""The command line. Prints, never computes. `main` turns every outcome into an exit code:

0 done, 1 our error, 2 usage, 130 interrupted. stdout carries results, stderr everything else.
"""

from __future__ import annotations

import sys
from typing import NoReturn

_GO_ON = "run the same command again to go on where it stopped"
HELP = "Compress large language models after training: quantize, prune, factorize, bundle, verify, evaluate, run."


def _normalise(args: list[str]) -> list[str]:
    """Accept `_` for `-` in option names."""
    out = []
    for arg in args:
        name, equals, value = arg.partition("=")
        out.append(name.replace("_", "-") + equals + value if arg.startswith("--") else arg)
    return out


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(code)


def main(args: list[str] | None = None) -> None:
    """Run the command line on `args` (default: sys.argv)."""
    from compress.cli.app import build
    from compress.errors import CompressError

    args = _normalise(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    try:
        code = build(args)(args=args, standalone_mode=False)
        sys.stdout.flush()
    except CompressError as error:
        if debug:
            raise
        _fail(error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, EOFError):
        _fail("interrupted", _GO_ON, 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except MemoryError:
        _fail("out of memory", "smaller --batch-size, fewer --nsamples, or --states disk", 1)
    except SystemExit:
        raise
    except Exception as error:
        if type(error).__name__ == "Abort":
            _fail("interrupted", _GO_ON, 130)
        if hasattr(error, "format_message"):  # usage errors of the option parser
            verb = next((a for a in args if not a.startswith("-")), "")
            _fail(error.format_message() or "wrong arguments", f"see: compress {verb} --help".replace("  ", " "), 2)
        if debug:
            raise
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            _fail("out of memory", "smaller --batch-size, fewer --nsamples, or --states disk", 1)
        _fail(f"{type(error).__name__}: {error}", "this is a bug in compress: run again with --debug and report it", 1)
    if code == 130:  # the option parser turns Ctrl-C into this code and says nothing
        _fail("interrupted", _GO_ON, 130)
    sys.exit(code if isinstance(code, int) else 0)

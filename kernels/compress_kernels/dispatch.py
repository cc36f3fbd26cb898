"""Which path a weight takes where several can run: the one that `compress bench tune` found fastest on this machine, if it ran.

Its table is a file of the user's cache folder (XDG_CACHE_HOME), one per machine, thread count and version of torch and of the C++
library. It says, per kind, bits, dtype of activations and size of the weight, the name of a path. Without it the kinds' own order
holds; nothing is ever measured while a model loads. COMPRESS_BACKEND goes before it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress_kernels import BACKENDS, native

logger = logging.getLogger(__name__)

SCHEMA = 1
SIZES = {"small": 1 << 20, "medium": 1 << 23}  # weights, at most; beyond: large
DECODING = ("cpu", "cpu-exact", "dense")  # paths whose weights native decoding (`block`) takes
TUNED = "it is slower here than {}, by compress bench tune"


def size_class(shape: tuple[int, int]) -> str:
    """The class of a weight (O, I)."""
    return next((name for name, most in SIZES.items() if shape[0] * shape[1] <= most), "large")


def key(kind: str, bits: int, dtype: torch.dtype, shape: tuple[int, int]) -> str:
    """The table's name of a case."""
    return f"{kind}/{bits}/{str(dtype).removeprefix('torch.')}/{size_class(shape)}"


def machine() -> dict[str, Any]:
    """What a measurement holds for."""
    isa = native.ISAS[native.isa()] if native.missing() is None else "none"
    facts = {"cpu": _cpu(), "isa": isa, "library": native.VERSION, "torch": torch.__version__}
    return {**facts, "threads": torch.get_num_threads()}


@functools.cache
def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def folder() -> Path:
    """Where tables lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llm-compress"


def path() -> Path:
    """Where this machine's table lies."""
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()
    return folder() / f"dispatch-{digest[:12]}.json"


def save(table: Mapping[str, str]) -> Path:
    """Write this machine's table, atomically; returns where."""
    out = path()
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temp.write_text(json.dumps({"schema": SCHEMA, "machine": machine(), "paths": dict(table)}, indent=2, sort_keys=True) + "\n")
    temp.replace(out)
    read.cache_clear()
    return out


@functools.cache
def read(where: Path) -> Mapping[str, str]:
    """The table in a file: empty where there is none, or where it is not this machine's, which is said once."""
    try:
        found = json.loads(where.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read (%s) and is left alone: compress bench tune writes it again", where, error)
        return {}
    paths = found.get("paths") if isinstance(found, dict) else None
    if not isinstance(paths, dict) or found.get("schema") != SCHEMA or any(p not in BACKENDS for p in map(str, paths.values())):
        logger.warning("%s is no table of paths and is left alone: compress bench tune writes it again", where)
        return {}
    if found.get("machine") != machine():
        logger.warning("%s was measured on another machine and is left alone: compress bench tune", where)
        return {}
    return {str(k): str(v) for k, v in paths.items()}


def candidates(paths: Sequence[str]) -> list[str]:
    """Of paths that can run, those that a table may name: with the C++ library those that native decoding takes, if there are such.

    Another path may be faster by itself, but one such weight would leave a model's every token to transformers.
    """
    decoding = [path for path in paths if path in DECODING] if native.missing() is None else []
    return decoding or list(paths)


def preferred(kind: str, bits: int, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    """The path that was measured to be the fastest of a case; None where nothing was measured."""
    return read(path()).get(key(kind, bits, dtype, shape))

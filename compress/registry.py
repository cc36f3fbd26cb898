"""The folder is the registry: a method or a format is one file of its package; nobody keeps a list."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from compress.errors import CompressError, nearest

_PACKAGE = Path(__file__).resolve().parent


def names(package: str) -> list[str]:
    """Names of the modules in `compress/<package>`, private ones left out. Imports nothing."""
    return sorted(p.stem for p in (_PACKAGE / package).glob("*.py") if not p.stem.startswith("_"))


@functools.cache
def summary(package: str, name: str) -> str:
    """First line of a module's docstring, read without importing it."""
    tree = ast.parse((_PACKAGE / package / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").split("\n")[0]


@functools.cache
def verb(method: str) -> str:
    """The verb that a method belongs to: its module's VERB, read without importing it; `quantize` where it has none."""
    path = _PACKAGE / "methods" / f"{method.replace('-', '_').lower()}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "VERB":
            return str(ast.literal_eval(node.value))
    return "quantize"


def methods(of: str) -> list[str]:
    """Names of the methods of one verb."""
    return [name for name in names("methods") if verb(name) == of]


def load(package: str, name: str) -> ModuleType:
    """Import `compress.<package>.<name>`; an unknown name is answered with the nearest known one."""
    known = names(package)
    module = name.replace("-", "_").lower()
    if module not in known:
        raise CompressError(f"unknown {package.rstrip('s')} {name!r}", hint=nearest(module, known), usage=True)
    return importlib.import_module(f"compress.{package}.{module}")


def pruned(packed: Any) -> Any:
    """The weight (O, I), fp32, of a `types.Packed` whose zeros are meant: its core's where its format has one, else its own."""
    form = by_kind(packed.kind)
    return getattr(form, "pruned", form.dequantize)(packed)


@functools.cache
def by_kind(kind: str) -> ModuleType:
    """The format module whose KIND is `kind`."""
    known = {}
    for name in names("formats"):
        module = importlib.import_module(f"compress.formats.{name}")
        known[module.KIND] = module
    if kind not in known:
        raise CompressError(
            f"unknown kind of compressed linear {kind!r}",
            hint="the artifact was written by a newer version: upgrade llm-compress",
        )
    return known[kind]

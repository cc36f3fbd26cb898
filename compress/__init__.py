"""compress: post-training compression for large language models. Lazy: importing it imports neither torch nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.bundling import bundle
    from compress.evaluation import evaluate
    from compress.extracting import extract
    from compress.fit import Report, factorize, prune, quantize
    from compress.loading import load, register
    from compress.merging import merge

__all__ = [
    "CompressError", "Report", "bundle", "evaluate", "extract", "factorize", "load", "merge", "prune", "quantize", "register",
]  # fmt: skip
_WHERE = {
    "quantize": "compress.fit",
    "factorize": "compress.fit",
    "prune": "compress.fit",
    "bundle": "compress.bundling",
    "extract": "compress.extracting",
    "merge": "compress.merging",
    "Report": "compress.fit",
    "load": "compress.loading",
    "register": "compress.loading",
    "evaluate": "compress.evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")

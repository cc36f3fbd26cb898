"""A pruned artifact read as the dense checkpoint that it stands for, so that it can be quantized, evaluated against, exported."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compress import registry
from compress.checkpoint import dtypes, manifest
from compress.checkpoint.reader import CheckpointReader, Entry
from compress.errors import CompressError
from compress.types import Packed, Sparsity, TensorSpec, Wrappers

_DAMAGED = "the artifact is damaged: copy it again"


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest where a folder is an artifact whose weights are all still 16 or 32 bits wide; else None."""
    if not (folder / manifest.FILE).is_file():
        return None
    known = manifest.read(folder)
    if not known["linears"]:  # merged, or one task of a bundle: an ordinary checkpoint
        return None
    for name, entry in known["linears"].items():
        why = getattr(registry.by_kind(entry["kind"]), "without_weight", lambda params: None)(entry["params"])
        if why is not None:
            raise CompressError(f"{folder}: {name} stands for no dense weight: {why}", hint="start from a dense checkpoint")
    narrow = any("bits" in entry["params"] and entry["kind"] != "dense" for entry in manifest.stored(known).values())
    return None if narrow else known


def history(known: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the manifest of an artifact made from a pruned one repeats: the model's name and size, and how it was pruned."""
    if known is None or not sparsity(known):
        return {}
    origin = known["source"]
    pruned = {key: known[key] for key in ("job", "method", "config")}
    return {"name": origin["name"], "weight_bytes": origin.get("weight_bytes"), "pruned": pruned}


def sparsity(known: Mapping[str, Any] | None) -> dict[str, Sparsity]:
    """What a manifest says about the zeros of each linear."""
    found = {}
    for name, entry in (known["linears"] if known is not None else {}).items():
        params = entry["params"]
        wrapped = (params["b_in"], params["b_out"]) if "b_in" in params else None
        if "mask_sha256" in entry and not (wrapped and entry["kind"] == "dense"):  # a product with wrappers has no zeros
            pattern = (params["n"], params["m"]) if "n" in params else None
            found[name] = Sparsity(pattern, entry["mask_sha256"], wrapped)
    return found


class UnpackedReader(CheckpointReader):
    """A checkpoint in which `<linear>.weight` stands where the artifact holds a format's tensors; of ARMOR's it is the core.

    `transposed` names the weights that the model keeps as (I, O).
    """

    def __init__(self, folder: str | Path, known: Mapping[str, Any], transposed: Collection[str] = ()) -> None:
        super().__init__(folder)
        self._stored = dict(self.entries)
        self._transposed = transposed
        self._known: Mapping[str, Mapping[str, Any]] = known["linears"]
        for linear, entry in self._known.items():
            if entry["kind"] != "dense":
                self._stand_in(linear, entry)

    def _stand_in(self, linear: str, entry: Mapping[str, Any]) -> None:
        shape = (int(entry["shape"][0]), int(entry["shape"][1]))
        suffixes = self._spec(linear, "F16")
        parts = [self.entry(f"{linear}.{suffix}") for suffix in suffixes]
        dtype = next(e.dtype for e in parts if e.dtype in dtypes.FLOATS)
        for suffix, (kind, size) in self._spec(linear, dtype).items():
            saw = self.entry(f"{linear}.{suffix}")
            if (saw.dtype, saw.shape) != (kind, size):
                raise CompressError(
                    f"{self.folder}: {linear}.{suffix} is {saw.dtype} {saw.shape}, its format asks for {kind} {size}", hint=_DAMAGED
                )
            del self.entries[f"{linear}.{suffix}"]
        name = f"{linear}.weight"
        stored = shape[::-1] if name in self._transposed else shape
        self.entries[name] = Entry(parts[0].file, dtype, stored, -1, math.prod(shape) * dtypes.itemsize(dtype))

    def _spec(self, linear: str, dtype: str) -> Mapping[str, TensorSpec]:
        """The tensors that a linear has in its format, for floats of `dtype`."""
        facts = self._known[linear]
        shape = (int(facts["shape"][0]), int(facts["shape"][1]))
        try:
            found: Mapping[str, TensorSpec] = registry.by_kind(facts["kind"]).spec(facts["params"], shape, dtype)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CompressError(f"{self.folder}: {linear} has params {facts['params']} in its manifest", hint=_DAMAGED) from error
        return found

    def read(self, name: str) -> torch.Tensor:
        entry = self.entry(name)
        if entry.offset >= 0:
            return super().read(name)
        linear = name.removesuffix(".weight")
        facts = self._known[linear]
        module = registry.by_kind(facts["kind"])
        shape = (int(facts["shape"][0]), int(facts["shape"][1]))
        tensors = {suffix: self._part(f"{linear}.{suffix}") for suffix in self._spec(linear, entry.dtype)}
        packed = Packed(module.KIND, module.VERSION, facts["params"], tensors, shape)
        problems = module.problems(packed) if hasattr(module, "problems") else []
        if problems:
            raise CompressError(f"{linear}: {problems[0]}", hint=_DAMAGED)
        W: torch.Tensor = registry.pruned(packed).to(dtypes.TORCH[entry.dtype])
        return W.T.contiguous() if name in self._transposed else W

    def wrappers(self, linear: str) -> Wrappers:
        """pre and post of a wrapped linear, as stacks of blocks."""
        form = registry.by_kind(self._known[linear]["kind"])
        parts = [suffix for suffix in self._spec(linear, "F16") if suffix in form.WRAPPERS]
        found: Wrappers = form.wrappers({suffix: self._part(f"{linear}.{suffix}") for suffix in parts})
        return found

    def _part(self, name: str) -> torch.Tensor:
        entry = self._stored[name]
        out = torch.empty(entry.shape, dtype=dtypes.TORCH[entry.dtype])
        self._fill(entry, out, 0, name)
        return out

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return super().read_rows(name, rows) if self.entry(name).offset >= 0 else self.read(name)[rows]

    def chunks(self, name: str, *limit: int) -> Iterator[torch.Tensor]:
        if self.entry(name).offset >= 0:
            yield from super().chunks(name, *limit)
        else:
            yield self.read(name).flatten()

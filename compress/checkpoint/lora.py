"""A PEFT LoRA folder read as the checkpoint that merging it into its base would give: W + scaling B A, rounded to the base's dtype.

`adapter_config.json` and `adapter_model.safetensors` as PEFT writes them: lora_A and lora_B of linears, lora_embedding_A and
lora_embedding_B of embeddings, whole tensors of `modules_to_save`; rank and alpha patterns, rank-stabilised scaling and
fan_in_fan_out are honoured, DoRA and LoRA on biases are refused. Sources: github huggingface/peft `tuners/lora/layer.py`,
`utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import dtypes
from compress.checkpoint.reader import CheckpointReader, Entry, matrix, parse_header, read_json
from compress.errors import CompressError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_ROWS = 32 << 20  # bytes of fp32 rows that are merged together


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


class LoraReader(CheckpointReader):
    """Tensors under the model's names; `stored` maps those to the base's own where they differ."""

    def __init__(self, folder: Path, base: CheckpointReader, stored: Mapping[str, str], names: list[str]) -> None:
        self.folder, self._open = folder, None
        self._base = base
        self._own = dict(parse_header(folder / WEIGHTS)) if (folder / WEIGHTS).is_file() else self._missing()
        self._stored = {name: stored.get(name, name) for name in names}
        self.entries = {name: base.entry(self._stored[name]) for name in names}
        config = read_json(folder / CONFIG)
        self._refuse(config)
        self._factors: dict[str, tuple[str, str, float, bool]] = {}  # name -> A, B, scaling, whether B A is transposed
        self._replaced: dict[str, str] = {}
        self._collect(config)
        self._cache: tuple[str, torch.Tensor, torch.Tensor] | None = None

    def _missing(self) -> dict[str, Entry]:
        raise CompressError(f"{self.folder}: no {WEIGHTS}", hint="save the adapter with safetensors (PEFT's save_pretrained)")

    def _refuse(self, config: Mapping[str, Any]) -> None:
        kind = str(config.get("peft_type", "")).upper()
        dora = config.get("use_dora") or any("lora_magnitude" in n for n in self._own)
        if kind != "LORA" or dora or any(n.endswith("lora_B.bias") for n in self._own):
            what = "DoRA" if dora else f"adapter of type {kind or 'unknown'}" if kind != "LORA" else "LoRA with biases"
            raise CompressError(f"{self.folder}: {what} cannot be merged here", hint="merge it with PEFT first (merge_and_unload)")

    def _collect(self, config: Mapping[str, Any]) -> None:
        parts: dict[tuple[str, bool], dict[str, str]] = {}
        for key in self._own:
            found = _FACTOR.fullmatch(key)
            if found:
                parts.setdefault((found[1].removeprefix(_PREFIX), bool(found[2])), {})[found[3]] = key
                continue
            name = key.removeprefix(_PREFIX).replace(".modules_to_save.default", "").replace(".modules_to_save", "")
            name = name.replace(".base_layer", "")
            self._replaced[name] = key
            self.entries[name] = self._own[key]
        for (module, embedding), pair in parts.items():
            name = f"{module}.weight"
            if name not in self.entries or set(pair) != {"A", "B"}:
                raise CompressError(f"{self.folder}: LoRA of {module}, which the base does not have", hint="is it another base's?")
            A, B = self._own[pair["A"]].shape, self._own[pair["B"]].shape
            turned = embedding or bool(config.get("fan_in_fan_out"))
            whole = (A[1], B[0]) if turned else (B[0], A[1])
            if A[0] != B[1] or whole != self.entries[name].shape:
                why = f"LoRA of {module} makes {list(whole)}, the base has {list(self.entries[name].shape)}"
                raise CompressError(f"{self.folder}: {why}", hint="is it another base's?")
            self._factors[name] = (pair["A"], pair["B"], _scaling(config, module, A[0]), turned)

    def files(self) -> list[str]:
        return [WEIGHTS]

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._replaced:
            entry = self._own[self._replaced[name]]
            columns = matrix(entry.shape)[1]
            out = torch.empty((stop - start, columns), dtype=dtypes.TORCH[entry.dtype])
            self._fill(entry, out, start * columns * dtypes.itemsize(entry.dtype), name)
            return out
        W = self._base.read_slice(self._stored[name], start, stop)
        if name not in self._factors:
            return W
        A, B, scaling, turned = self._pair(name)
        delta = A[:, start:stop].T @ B.T if turned else B[start:stop] @ A
        return (W.float() + scaling * delta).to(W.dtype)

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float, bool]:
        a, b, scaling, turned = self._factors[name]
        if self._cache is None or self._cache[0] != name:
            A, B = (self._raw(key) for key in (a, b))
            self._cache = (name, A, B)
        return self._cache[1], self._cache[2], scaling, turned

    def _raw(self, key: str) -> torch.Tensor:
        entry = self._own[key]
        out = torch.empty(entry.shape, dtype=dtypes.TORCH[entry.dtype])
        self._fill(entry, out, 0, key)
        if not dtypes.finite(out):
            raise CompressError(f"{self.folder.name}: {key}: holds NaN or Inf", hint="its training diverged: get a good copy")
        return out.float()

    def read(self, name: str) -> torch.Tensor:
        pieces = list(self.chunks(name))
        return torch.cat(pieces).view(self.entry(name).shape)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.read_slice(name, r, r + 1) for r in rows.tolist()])

    def chunks(self, name: str, limit: int = _ROWS) -> Iterator[torch.Tensor]:
        rows, columns = matrix(self.entry(name).shape)
        step = max(1, limit // (4 * max(columns, 1)))
        for start in range(0, rows, step):
            yield self.read_slice(name, start, min(start + step, rows)).flatten()


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised; patterns override alpha."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

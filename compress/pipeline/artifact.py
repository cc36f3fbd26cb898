"""The files of an artifact beside its shards: config.json, the model's companions, a model card, the manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint import manifest
from compress.checkpoint.reader import read_json
from compress.checkpoint.source import companions
from compress.checkpoint.writer import disk_errors, fsync_folder, write_file, write_json
from compress.formats._where import loads
from compress.models.skeleton import Skeleton
from compress.pipeline.layout import Layout


def quantization_config(layout: Layout, skeleton: Skeleton) -> dict[str, Any] | None:
    """The `quantization_config` of config.json for a layout; None for dense weights."""
    untouched = [n for n in skeleton.all_linears() if n not in layout.targets]
    params = next(iter(layout.targets.values())).params
    if layout.name == "dense":
        return None
    if layout.name == "awq":
        return {
            "quant_method": "awq", "bits": params["bits"], "group_size": params["group_size"], "zero_point": True,
            "version": "gemm", "modules_to_not_convert": untouched,
        }  # fmt: skip
    widths = by_width(layout)
    groups = {
        f"group_{i}": _group(layout, params, bits, ["Linear"] if len(widths) == 1 else names)
        for i, (bits, names) in enumerate(sorted(widths.items()))
    }
    out: dict[str, Any] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": untouched, "config_groups": groups,
    }  # fmt: skip
    if not params["symmetric"]:  # compressed-tensors 0.20 cannot keep packed zero-points: it must dequantize at load
        out["dequantize"] = True
    return out


def by_width(layout: Layout) -> dict[int, list[str]]:
    """Names of the linears of each width."""
    found: dict[int, list[str]] = {}
    for target in layout.targets.values():
        found.setdefault(int(target.params["bits"]), []).append(target.name)
    return found


def _group(layout: Layout, params: Mapping[str, Any], bits: int, targets: list[str]) -> dict[str, Any]:
    """One config group of compressed-tensors."""
    size = params["group_size"]
    weights = {
        "num_bits": bits, "type": "int", "symmetric": params["symmetric"], "strategy": "channel" if size == -1 else "group",
        "group_size": None if size == -1 else size, "dynamic": False, "actorder": None,
    }  # fmt: skip
    one: dict[str, Any] = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
    if layout.guarded:
        one["format"] = f"compress-{layout.kind}"
    return one


def _card(name: str, method: str, layout: Layout, config: dict[str, Any]) -> str:
    params = next(iter(layout.targets.values())).params
    kind = "symmetric" if params["symmetric"] else "asymmetric"
    group = "one group per row" if params["group_size"] == -1 else f"groups of {params['group_size']}"
    bits = "/".join(str(b) for b in sorted(by_width(layout)))
    rows = "\n".join(f"| {who} | {answer} |" for who, answer in loads(config))
    return (
        f"---\nlibrary_name: transformers\ntags: [compress, {method}]\n---\n# {name}, {method.upper()} {bits}-bit\n\n"
        f"Compressed with llm-compress: {method}, {bits} bits, {kind}, "
        f"{group}, "
        f"format `{layout.name}`, kind `{layout.kind}`. `manifest.json` records every linear's error, the settings and the hashes; "
        f"`compress verify` checks them.\n\n| loader | loads |\n| --- | --- |\n{rows}\n"
    )


def write_companions(
    source: Path, folder: Path, layout: Layout, skeleton: Skeleton, method: str, name: str, untied: bool
) -> None:
    """config.json, the card, and a copy of every file that belongs to the model."""
    config = read_json(source / "config.json")
    if untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):  # transformers ties where either says so
            config["text_config"]["tie_word_embeddings"] = False
    quant = quantization_config(layout, skeleton)
    if quant is not None:
        config["quantization_config"] = quant
    if layout.cast == "F16":
        config.pop("torch_dtype", None)
        config["dtype"] = "float16"
    write_json_as_is(folder / "config.json", config)
    write_file(folder / "README.md", _card(name, method, layout, config).encode())
    for path in companions(source):
        with disk_errors(folder / path.name):
            shutil.copyfile(path, folder / path.name)
    fsync_folder(folder)


def write_json_as_is(path: Path, value: dict[str, Any]) -> None:
    """JSON in the order given, as transformers writes its own."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """The manifest, last of all: without it a folder is not an artifact."""
    write_json(folder / manifest.FILE, {"schema": manifest.SCHEMA, **facts, "files": manifest.file_table(folder)})

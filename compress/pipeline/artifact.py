"""The files of an artifact beside its shards: config.json, the model's companions, a model card, the manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compress.checkpoint import manifest
from compress.checkpoint.reader import read_json
from compress.checkpoint.source import companions
from compress.checkpoint.writer import disk_errors, fsync_folder, write_file, write_json
from compress.formats._where import loads
from compress.models.skeleton import Skeleton
from compress.pipeline.layout import Layout


def quantization_config(layout: Layout, params: dict[str, Any], skeleton: Skeleton) -> dict[str, Any] | None:
    """The `quantization_config` of config.json for a layout; None for dense weights."""
    untouched = [n for n in skeleton.all_linears() if n not in layout.targets]
    bits, group, symmetric = params["bits"], params["group_size"], params["symmetric"]
    if layout.name == "dense":
        return None
    if layout.name == "awq":
        return {
            "quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": untouched,
        }  # fmt: skip
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group, "dynamic": False, "actorder": None,
    }  # fmt: skip
    one: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    if layout.guarded:
        one["format"] = f"compress-{layout.kind}"
    out: dict[str, Any] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": untouched, "config_groups": {"group_0": one},
    }  # fmt: skip
    if not symmetric:  # compressed-tensors 0.20 cannot keep packed zero-points: it must dequantize at load
        out["dequantize"] = True
    return out


def _card(name: str, method: str, layout: Layout, params: dict[str, Any], config: dict[str, Any]) -> str:
    kind = "symmetric" if params["symmetric"] else "asymmetric"
    group = "one group per row" if params["group_size"] == -1 else f"groups of {params['group_size']}"
    rows = "\n".join(f"| {who} | {answer} |" for who, answer in loads(config))
    return (
        f"---\nlibrary_name: transformers\ntags: [compress, {method}]\n---\n# {name}, {method.upper()} {params['bits']}-bit\n\n"
        f"Compressed with llm-compress: {method}, {params['bits']} bits, {kind}, "
        f"{group}, "
        f"format `{layout.name}`. `manifest.json` records every linear's error, the settings and the hashes; "
        f"`compress verify` checks them.\n\n| loader | loads |\n| --- | --- |\n{rows}\n"
    )


def write_companions(
    source: Path, folder: Path, layout: Layout, params: dict[str, Any], skeleton: Skeleton, method: str, name: str, untied: bool
) -> None:
    """config.json, the card, and a copy of every file that belongs to the model."""
    config = read_json(source / "config.json")
    if untied:
        config["tie_word_embeddings"] = False
    quant = quantization_config(layout, params, skeleton)
    if quant is not None:
        config["quantization_config"] = quant
    if layout.cast == "F16":
        config.pop("torch_dtype", None)
        config["dtype"] = "float16"
    write_json_as_is(folder / "config.json", config)
    write_file(folder / "README.md", _card(name, method, layout, params, config).encode())
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

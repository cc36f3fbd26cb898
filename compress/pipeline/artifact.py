"""The files of an artifact beside its shards: config.json, the model's companions, a model card, the manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compress import registry
from compress.checkpoint import manifest
from compress.checkpoint.reader import read_json
from compress.checkpoint.source import companions
from compress.checkpoint.writer import disk_errors, fsync_folder, write_file, write_json
from compress.formats import lowrank_sparse
from compress.formats._where import loads
from compress.models.skeleton import Skeleton
from compress.pipeline.layout import AWQ, DENSE, Layout, Target

# params of single linears, which a loader reads off their tensors
COUNTED = frozenset({"nnz", "outliers", "second_level"})


def quantization_config(layout: Layout, skeleton: Skeleton) -> dict[str, Any] | None:
    """The `quantization_config` of config.json for a layout; None for dense weights."""
    untouched = [n for n in skeleton.all_linears() if n not in layout.targets and n not in layout.heads]
    params = next(iter(layout.targets.values())).params
    if layout.name == DENSE:
        return None
    if layout.name == AWQ:
        return {
            "quant_method": "awq", "bits": params["bits"], "group_size": params["group_size"], "zero_point": True,
            "version": "gemm", "modules_to_not_convert": untouched,
        }  # fmt: skip
    alike = _alike(layout)
    several = sum(same[0].name != layout.embedding for same in alike) > 1  # an embedding is no Linear: its target is its name
    groups = {
        f"group_{i}": _group(layout, same, None if several or same[0].name == layout.embedding else ["Linear"])
        for i, same in enumerate(alike)
    }
    out: dict[str, Any] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": untouched, "config_groups": groups,
    }  # fmt: skip
    # compressed-tensors 0.20 cannot keep packed zero-points, nor transformers 5.24 a packed embedding: they dequantize at load
    if not params.get("symmetric", True) or layout.embedding is not None:
        out["dequantize"] = True
    return out


def _shared(target: Target) -> dict[str, Any]:
    """Format params that a group of linears has in common: those that its tensors do not tell."""
    told = COUNTED | getattr(registry.by_kind(target.kind), "TOLD", frozenset())
    return {key: value for key, value in sorted(target.params.items()) if key not in told}


def _alike(layout: Layout) -> list[list[Target]]:
    """Linears of one kind and equal params, by width; the head is one of them, the embedding comes last, by itself."""
    found: dict[tuple[bool, int, str], list[Target]] = {}
    for target in (*layout.targets.values(), *layout.heads.values()):
        key = target.name == layout.embedding, target.params.get("bits", 16), json.dumps([target.kind, _shared(target)])
        found.setdefault(key, []).append(target)
    return [found[key] for key in sorted(found)]


def _group(layout: Layout, same: list[Target], targets: list[str] | None) -> dict[str, Any]:
    """One config group of compressed-tensors; guarded ones carry our own params beside its words for them."""
    params = same[0].params
    weights = None
    if "bits" in params:
        size = params["group_size"]
        weights = {
            "num_bits": params["bits"], "type": "int", "symmetric": params["symmetric"],
            "strategy": "channel" if size == -1 else "group", "group_size": None if size == -1 else size, "dynamic": False,
            "actorder": None,
        }  # fmt: skip
    one: dict[str, Any] = {"targets": targets or [t.name for t in same], "weights": weights}
    one |= {"input_activations": None, "output_activations": None}
    if layout.guarded:
        one |= {"format": f"compress-{same[0].kind}", "compress": _shared(same[0])}
    return one


def words(layout: Layout) -> str:
    """What was done to the linears, for people."""
    params = [t.params for t in layout.targets.values()]
    patterns = sorted({f"{p['n']}:{p['m']}" for p in params if "n" in p})
    out = [f"{'/'.join(patterns)} sparse"] if patterns else []
    if "nnz" in params[0]:
        total = sum(t.shape[0] * t.shape[1] for t in layout.targets.values())
        out.append(f"{1 - sum(p['nnz'] for p in params) / total:.1%} zeros")
    if "gamma" in params[0]:
        ranks, kept = (sorted({p[key] for p in params}) for key in ("rank", "kept"))
        out.append(f"rank {'/'.join(map(str, ranks))}, {'/'.join(map(str, kept))} dense columns, gamma {params[0]['gamma']:g}")
    elif "rank" in params[0]:
        total = sum(t.shape[0] * t.shape[1] for t in layout.targets.values())
        left = sum(lowrank_sparse.parameters(t.params, t.shape) for t in layout.targets.values())
        out.append(f"{left / total:.1%} of the parameters")
        out += [f"{params[0]['value_bits']} bits"] if "value_bits" in params[0] else []
    if "bits" in params[0]:
        size = params[0]["group_size"]
        out += [
            "/".join(str(b) for b in sorted({p["bits"] for p in params})) + " bits",
            "symmetric" if params[0]["symmetric"] else "asymmetric", "one group per row" if size == -1 else f"groups of {size}",
        ]  # fmt: skip
    what = "head" if layout.embedding is None else "embedding and head"
    out += [f"{what} {t.params['bits']} bits" for t in list(layout.heads.values())[:1]]
    return ", ".join(out)


def _card(name: str, method: str, layout: Layout, config: dict[str, Any]) -> str:
    rows = "\n".join(f"| {who} | {answer} |" for who, answer in loads(config))
    kinds = ", ".join(f"`{k}`" for k in sorted({t.kind for t in layout.targets.values()}))
    what = words(layout)
    return (
        f"---\nlibrary_name: transformers\ntags: [compress, {method}]\n---\n# {name}, {method.upper()}, {what}\n\n"
        f"Compressed with llm-compress: {method}, {what}, "
        f"format `{layout.name}`, kind {kinds}. `manifest.json` records every linear's error, the settings and the hashes; "
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
    config.pop("quantization_config", None)  # of a pruned source
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

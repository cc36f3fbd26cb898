"""What `quantization_config` says: the groups of compressed modules, ours, compressed-tensors' pack-quantized and AWQ's gemm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress import registry
from compress.checkpoint.bundled import GUARD
from compress.errors import CompressError
from compress.formats import awq

OWN = "compress-"  # begins the formats that stock loaders must refuse
_UNFIT = "the weights and config.json do not fit: was one of them edited or replaced?"


@dataclass(frozen=True, slots=True)
class Scheme:
    """What `quantization_config` says about one group of linears."""

    kind: str
    params: Mapping[str, Any]
    targets: tuple[str, ...]


def schemes(settings: Mapping[str, Any]) -> list[Scheme]:
    """The groups of `quantization_config`, of which every one must be something that we can run."""
    method = settings.get("quant_method")
    if method == "awq":
        version, bits = settings.get("version", "gemm"), settings.get("bits", settings.get("w_bit"))
        if str(version).lower() != "gemm" or bits != 4:
            raise unsupported(f"AWQ version {version!r} with {bits} bits")
        size = settings.get("group_size", settings.get("q_group_size"))
        return [Scheme(awq.KIND, {"bits": 4, "group_size": size, "symmetric": False}, ("Linear",))]
    if method != "compressed-tensors" or not settings.get("config_groups"):
        raise unsupported(f"quant_method {method!r}")
    found = []
    for group in settings["config_groups"].values():
        form = str(group.get("format") or settings.get("format"))
        if form != "pack-quantized" and not form.startswith(OWN):
            raise unsupported(f"format {form!r}")
        if form == GUARD:
            raise CompressError("a bundle of fine-tunes", hint="compress.load(BUNDLE, task=NAME), or compress extract first")
        kind = "int_grouped" if form == "pack-quantized" else form.removeprefix(OWN)
        registry.by_kind(kind)  # refuses what we do not know
        params = group["compress"] if isinstance(group.get("compress"), dict) else _weights(group)
        found.append(Scheme(kind, params, tuple(group.get("targets", ()))))
    return found


def _weights(group: Mapping[str, Any]) -> dict[str, Any]:
    """Our params of a compressed-tensors group: bits, group_size, symmetric."""
    weights = group.get("weights") or {}
    strategy, bits = weights.get("strategy"), weights.get("num_bits")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel") or bits not in range(2, 9):
        raise unsupported(f"{bits}-bit {weights.get('type')} weights with strategy {strategy!r}")
    if group.get("input_activations") or group.get("output_activations"):
        raise unsupported("quantized activations")
    size = weights.get("group_size") if strategy == "group" else -1
    return {"bits": bits, "group_size": size, "symmetric": bool(weights.get("symmetric", True))}


def unsupported(what: str) -> CompressError:
    hint = "load it with transformers' AutoModelForCausalLM, or upgrade llm-compress if that wrote it"
    return CompressError(f"quantization_config: {what} is not supported here", hint=hint)


def scheme_of(name: str, module: nn.Module, known: list[Scheme]) -> Scheme:
    """The group of a linear, by compressed-tensors' rules: its name, then a regular expression, then its class."""
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target == name,
        lambda target: target.startswith("re:") and re.match(target[3:], name) is not None,
        lambda target: target in {"Linear", *(cls.__name__ for cls in type(module).__mro__)},
    )
    for test in tests:
        for scheme in known:
            if any(map(test, scheme.targets)):
                return scheme
    raise CompressError(f"{name}: compressed, but no group of quantization_config covers it", hint=_UNFIT)



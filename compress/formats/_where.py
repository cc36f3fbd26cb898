"""Where an artifact loads: one table, used by `inspect` and by the model card. Source: measurements in docs/artifact.md."""

from __future__ import annotations

from typing import Any


def loads(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(loader, answer) rows for a `config.json` with or without a `quantization_config`."""
    quant = config.get("quantization_config")
    own = ("compress.load", "yes")
    if quant is None:
        return [("transformers", "yes, an ordinary dense checkpoint"), ("vLLM", "yes"), own]
    if quant.get("quant_method") == "awq":
        return [
            ("transformers", "with the packages gptqmodel and accelerate"),
            ("vLLM", "yes: awq (float16) or awq_marlin, by its documentation; not run by us"),
            own,
        ]
    groups = list(quant.get("config_groups", {}).values())
    guarded = [g["format"] for g in groups if str(g.get("format", "")).startswith("compress-")]
    if guarded:
        why = f"no: it refuses {guarded[0]} on purpose"
        if guarded[0] == "compress-masked_delta":
            return [("transformers", why), ("vLLM", "no"), ("compress.load", "yes: task=NAME, or none for mixed batches")]
        return [("transformers", why), ("vLLM", "no"), ("transformers after compress.register()", "yes"), own]
    weights = groups[0]["weights"]
    bits, symmetric = weights["num_bits"], weights["symmetric"]
    stock = "yes, with compressed-tensors >= 0.19 (weights become dense on the first forward pass)"
    if quant.get("dequantize") or not symmetric:
        stock = 'yes, with compressed-tensors >= 0.19, through "dequantize": true (weights become dense at load)'
    vllm = "yes, by its source; not run by us" if symmetric or bits in (4, 8) else f"no: asymmetric {bits} bits"
    if len(groups) > 1:
        vllm = "not checked: linears that it fuses (q, k, v; gate, up) would need one width, an embedding to be one that it reads"
    return [("transformers", stock), ("vLLM", vllm), own]

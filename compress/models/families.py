"""Model families as data: which linears share an input, and which operators can absorb a per-channel scale.

The mappings are those of llm-awq `auto_scale.py` and AutoAWQ `awq/models/*.py`, with four corrections of our own: GQA's v -> o
scale is tied over the repeats instead of skipped; Phi-3's fused qkv and gate_up carry the scale on exactly their v and up
rows; Gemma's (1 + w) norms are divided as such; Gemma 3's input norm -> qkv is left out (llm-compressor #2522: harmful).
Names are relative to the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from compress.types import Scaling

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One model family. `scalings` is a function of the transformers config, since head counts live there."""

    blocks: str  # path of the ModuleList of blocks
    groups: Groups
    scalings: Callable[[Any], tuple[Scaling, ...]]
    no_clip: frozenset[str]
    rotates: str = ""  # "residual": R1 and R2 (models.rotate); "values": R2 only; "": neither
    writers: tuple[str, ...] = ()  # linears whose output is added to the residual stream
    final_norm: str = "model.norm"
    images: tuple[str, ...] | None = ()  # what makes the image embeddings; None: not known


def heads(config: Any) -> tuple[int, int, int]:
    """(n_kv, n_rep, head_dim) of a transformers config."""
    n = config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", None) or n
    return n_kv, n // n_kv, getattr(config, "head_dim", None) or config.hidden_size // n


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA_GROUPS: Groups = (_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",))
_QK = frozenset(_QKV[:2])


def _value_output(config: Any) -> Scaling:
    n_kv, n_rep, head_dim = heads(config)
    tied = (n_kv, n_rep, head_dim) if n_rep > 1 else None
    return Scaling("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", heads=tied)


_UP_DOWN = Scaling("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")


def _llama(config: Any) -> tuple[Scaling, ...]:
    return (
        Scaling("input_layernorm", _QKV, "self_attn", norm=True),
        _value_output(config),
        Scaling("post_attention_layernorm", _GATE_UP, "mlp", norm=True),
        _UP_DOWN,
    )


def _gemma(config: Any) -> tuple[Scaling, ...]:
    return (
        Scaling("input_layernorm", _QKV, "self_attn", norm=True, norm_offset=1.0),
        _value_output(config),
        Scaling("post_attention_layernorm", _GATE_UP, "mlp", norm=True, norm_offset=1.0),
        _UP_DOWN,
    )


def _gemma2(config: Any) -> tuple[Scaling, ...]:
    return (
        Scaling("input_layernorm", _QKV, "self_attn", norm=True, norm_offset=1.0),
        _value_output(config),
        Scaling("pre_feedforward_layernorm", _GATE_UP, "mlp", norm=True, norm_offset=1.0),
        _UP_DOWN,
    )


def _gemma3(config: Any) -> tuple[Scaling, ...]:
    return _gemma2(config)[1:]


def _phi3(config: Any) -> tuple[Scaling, ...]:
    n_kv, n_rep, head_dim = heads(config)
    end = (n_kv * n_rep + 2 * n_kv) * head_dim
    tied = (n_kv, n_rep, head_dim) if n_rep > 1 else None
    qkv, o, gate_up, down = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
    inner = config.intermediate_size
    return (
        Scaling("input_layernorm", (qkv,), "self_attn", norm=True),
        Scaling(qkv, (o,), o, rows=(end - n_kv * head_dim, end), heads=tied),
        Scaling("post_attention_layernorm", (gate_up,), "mlp", norm=True),
        Scaling(gate_up, (down,), down, rows=(inner, 2 * inner)),
    )


def _opt(config: Any) -> tuple[Scaling, ...]:
    norms: tuple[Scaling, ...] = ()
    if config.do_layer_norm_before and config.layer_norm_elementwise_affine:
        norms = (
            Scaling("self_attn_layer_norm", _QKV, "self_attn", norm=True),
            Scaling("final_layer_norm", ("fc1",), "fc1", norm=True),
        )
    value = Scaling("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj")
    # ReLU commutes with a positive scale; other activations do not
    fc = (Scaling("fc1", ("fc2",), "fc2"),) if config.activation_function == "relu" else ()
    return (*norms, value, *fc)


def _gpt2(config: Any) -> tuple[Scaling, ...]:
    D = config.hidden_size
    return (
        Scaling("ln_1", ("attn.c_attn",), "attn", norm=True),
        Scaling("attn.c_attn", ("attn.c_proj",), "attn.c_proj", rows=(2 * D, 3 * D)),
        Scaling("ln_2", ("mlp.c_fc",), "mlp", norm=True),
    )


_PHI3_GROUPS: Groups = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
_OPT_GROUPS: Groups = (_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",))
_GPT2_GROUPS: Groups = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))

_WRITERS = ("self_attn.o_proj", "mlp.down_proj")

FAMILIES: dict[str, Family] = {
    **{
        m: Family("model.layers", _LLAMA_GROUPS, _llama, _QK, "residual", _WRITERS)
        for m in ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text")
    },
    "gemma": Family("model.layers", _LLAMA_GROUPS, _gemma, _QK, "residual", _WRITERS),
    "gemma2": Family("model.layers", _LLAMA_GROUPS, _gemma2, _QK, "values", _WRITERS),
    "gemma3_text": Family("model.layers", _LLAMA_GROUPS, _gemma3, _QK, "values", _WRITERS),
    "phi3": Family("model.layers", _PHI3_GROUPS, _phi3, frozenset({"self_attn.qkv_proj"}), "residual", _WRITERS),
    "opt": Family("model.decoder.layers", _OPT_GROUPS, _opt, _QK),
    "gpt2": Family("transformer.h", _GPT2_GROUPS, _gpt2, frozenset({"attn.c_attn"})),
}

# Linears and parameters of vision-language models whose outputs take the place of token embeddings.
_PROJECTOR = "model.multi_modal_projector.linear_2"
IMAGES: dict[str, tuple[str, ...]] = {
    **{m: ("model.visual.merger.mlp.2",) for m in ("qwen2_vl", "qwen2_5_vl")},
    **{m: (_PROJECTOR,) for m in ("llava", "vipllava", "internvl", "mistral3")},
    **{m: (_PROJECTOR, "model.image_newline") for m in ("llava_next", "llava_onevision")},
    "paligemma": ("model.multi_modal_projector.linear",),
    **{m: ("model.connector.modality_projection.proj",) for m in ("idefics3", "smolvlm")},
}


def find(config: Any, trunk: str = "") -> Family | None:
    """The table's row of a model; for a vision-language model that of its text decoder, whose path is `trunk`."""
    text = config.get_text_config()
    row = FAMILIES.get(text.model_type)
    if row is None or text is config:
        return row
    blocks, norm = (f"{trunk}.{path.partition('.')[2]}" for path in (row.blocks, row.final_norm))
    return replace(row, blocks=blocks, final_norm=norm, images=IMAGES.get(config.model_type))

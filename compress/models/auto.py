"""What transformers knows of a model beside its modules: the class that builds it, its text decoder, older tensor names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from compress.errors import CompressError


def composite(config: Any) -> bool:
    """Whether a config nests its text model's, as those of vision-language models do."""
    return config.get_text_config() is not config


def auto_class(config: Any) -> Any:
    """The transformers class that builds a config's model whole: with its vision tower where it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = composite(config) and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def trunk(model: Any) -> nn.Module:
    """The part of a model that turns embeddings of tokens into hidden states: all but the head and the vision tower."""
    if not composite(model.config):
        return model.base_model  # type: ignore[no-any-return]
    found = model.get_decoder()
    found = getattr(found, "base_model", found)
    own = {id(m) for m in found.modules()}
    if model.base_model is model or found is model.base_model or id(model.get_input_embeddings()) not in own:
        raise CompressError(
            f"model family {model.config.model_type!r}: its text decoder was not found beside its vision tower",
            hint="supported are models that keep it as a module of its own, such as Qwen2-VL and LLaVA",
        )
    return found  # type: ignore[no-any-return]


def spelling(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Names in a checkpoint -> the model's, by the renames that transformers applies when it loads one.

    Vision-language checkpoints keep older names (`visual.…`, `language_model.model.…`), and `save_pretrained` writes
    those again. Others lack the base model's prefix (GPT-2's `h.0…`). A name that fits no tensor, or one that is there under
    its own name, stays as it is.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renames = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    state, modules = set(model.state_dict()), {n for n, m in model.named_modules() if hasattr(m, "weight")}

    def known(name: str) -> bool:  # packed linears have tensors of other names
        return name in state or name.rpartition(".")[0] in modules

    out: dict[str, str] = {}
    for name in stored:
        renamed = name
        for rename in renames:
            renamed, _ = rename.rename_source_key(renamed)
        out[name] = next((n for n in (renamed, f"{model.base_model_prefix}.{renamed}") if known(n)), name)
    return {name: name if found in out else found for name, found in out.items()}

"""The loop around native steps for one text: what transformers' `generate` does for plain greedy search and sampling, and no more.

`generate` itself takes a third of the time of a small model's token; its tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from compress.decoding import Decoding, cache_name
from compress.decoding.cache import adopt

# what a generation config may set: the rest asks for `generate`
_UNDERSTOOD = {
    "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "do_sample", "temperature", "top_k",
    "top_p", "max_length", "max_new_tokens", "output_attentions", "output_hidden_states",
}  # fmt: skip


def usable(model: Any) -> str | None:
    """None, or the reason why `tokens` cannot take `generate`'s place for this model."""
    decoding = getattr(model, "decoding", None)
    if not isinstance(decoding, Decoding):
        return "the model has no native decoder"
    asked = {k for k, v in model.generation_config.to_diff_dict().items() if not k.startswith("_") and v is not None}
    if asked - _UNDERSTOOD:
        return f"its generation config has {', '.join(sorted(asked - _UNDERSTOOD))}"
    plan = decoding.plan()
    return plan if isinstance(plan, str) else plan.interrupted()


@torch.inference_mode()
def tokens(
    model: Any, ids: torch.Tensor, count: int, *, temperature: float = 0.0, seed: int = 0, ends: bool = True
) -> Iterator[int]:
    """Yield up to `count` new tokens behind ids (1, T), where `usable` has said None; greedy at temperature 0.

    The last one is the model's end-of-text token where it comes first, unless `ends` is false.
    """
    from transformers import DynamicCache

    decoding: Decoding = model.decoding
    plan = decoding.plan()
    assert not isinstance(plan, str), plan
    choose = _sampler(model.generation_config, temperature, seed) if temperature > 0 else _greedy
    stop = _ends(model.generation_config) if ends else set()
    cache = DynamicCache(config=model.config)
    adopt(cache, plan.blocks)
    logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_name(): cache}).logits[:, -1].float()
    first = torch.zeros(1, dtype=torch.int64)
    for n in range(count):
        token = choose(logits)
        value = int(token)
        yield value
        if n + 1 == count or value in stop:
            return
        logits = decoding.step(plan, token.view(1, 1), cache.layers, first, [ids.shape[1] + n])


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def _sampler(config: Any, temperature: float, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """transformers' own warpers, in its order and with its defaults."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    top_k, top_p = 50 if config.top_k is None else config.top_k, 1.0 if config.top_p is None else config.top_p
    warp = LogitsProcessorList()
    if temperature != 1.0:
        warp.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warp.append(TopKLogitsWarper(top_k=top_k))
    if top_p < 1.0:
        warp.append(TopPLogitsWarper(top_p=top_p))
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(warp(None, logits).softmax(-1), 1, generator=generator).view(1)

    return choose


def _ends(config: Any) -> set[int]:
    found = config.eos_token_id
    return set() if found is None else set(found) if isinstance(found, list | tuple) else {int(found)}

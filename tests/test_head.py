"""The loss at the end of the model and its gradient, the vocabulary in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.models.head import Head
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma", "gemma2", "gpt2", "opt"])
def test_loss_and_gradient_are_those_of_the_whole_model(
    family: str, pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("compress.models.head._ROWS", 50)  # 128 rows of vocabulary, 46 tokens: pieces that do not divide
    monkeypatch.setattr("compress.models.head._TOKENS", 17)
    folder = pico(family)
    skeleton = Skeleton(load_config(folder))
    view = CheckpointView(CheckpointReader(folder), skeleton)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokens = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.retain_grad()
        seen.append(hidden)

    model.get_submodule(skeleton.path)[-1].register_forward_hook(keep)  # type: ignore[index,operator]
    logits = model(tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    losses.sum().backward()
    assert seen[0].grad is not None
    loss, gradient = Head(skeleton, view, torch.float64).gradient(seen[0].detach(), tokens)
    assert torch.allclose(loss, losses, atol=1e-6)  # norms compute in fp32 inside the models
    assert float((gradient - seen[0].grad).norm() / seen[0].grad.norm()) < 1e-5


def test_heads_that_scale_their_logits_are_refused(pico: Callable[..., Path]) -> None:
    folder = pico("cohere")
    skeleton = Skeleton(load_config(folder))
    with pytest.raises(CompressError, match="logit_scale"):
        Head(skeleton, CheckpointView(CheckpointReader(folder), skeleton), torch.float32)

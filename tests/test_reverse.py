"""The reverse walk: gradients equal to the whole model's, one block at a time, resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, tree

import compress
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.methods import rtn
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView
from compress.pipeline import layout
from compress.pipeline.blocks import Blocks
from compress.pipeline.reverse import Reverse
from compress.types import Block

DOUBLE = torch.float64


class Whole:
    """`types.Reducer` that keeps everything: the gradients' sum, and the sums of |g| and g² over the samples."""

    def __init__(self, block: Block) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._samples: dict[str, int] = {}

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        g = dy.T @ x
        for key, value in ((name, g), (f"abs:{name}", g.abs()), (f"sq:{name}", g.square())):
            self._kept[key] = self._kept.get(key, torch.zeros_like(value)) + value

    def result(self) -> dict[str, torch.Tensor]:
        return self._kept


def reverse(folder: Path, tokens: torch.Tensor, where: Path, states: Path | None = None) -> Reverse:
    skeleton = Skeleton(load_config(folder))
    view = CheckpointView(CheckpointReader(folder), skeleton)
    plan = layout.make(skeleton, view, rtn.Config(group_size=-1), "pack-quantized", ())
    return Reverse(Blocks(skeleton, view, "cpu", DOUBLE), plan, tokens, [Whole], where, states)


def whole_model(folder: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same sums from one backward pass of the whole model per sample."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DOUBLE).eval()
    out: dict[str, torch.Tensor] = {}
    for row in tokens:
        model.zero_grad()
        logits = model(row[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            g = p.grad.T if type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and p.dim() == 2 else p.grad
            for key, value in ((name, g), (f"abs:{name}", g.abs()), (f"sq:{name}", g.square())):
                out[key] = out.get(key, torch.zeros_like(value)) + value
    return out


def fp64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS norms of transformers compute in fp32 whatever the dtype, which hides digits: here they keep theirs."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))  # type: ignore[no-any-return]

    for norm in (LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
def test_gradients_equal_those_of_the_whole_model_in_double_precision(
    family: str, pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp64_norms(monkeypatch)
    monkeypatch.setattr("compress.models.head._ROWS", 50)
    monkeypatch.setattr("compress.pipeline.reverse._HEAD_TOKENS", 48)
    folder = pico(family)
    tokens = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(1))
    walk = reverse(folder, tokens, tmp_path / "reverse")
    walk.run()
    want = whole_model(folder, tokens)
    for index in range(len(walk.blocks)):
        found = walk.result(index)
        assert len(found) == 3 * len(walk.blocks.skeleton.linears(index))
        for key, value in found.items():
            kind, _, name = key.rpartition(":")
            full = f"{walk.blocks.skeleton.prefix(index)}{name}.weight"
            reference = want[f"{kind}:{full}" if kind else full]
            assert float((value - reference).norm() / reference.norm()) < 1e-10


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3", "stablelm"])
def test_gradients_agree_where_norms_keep_fewer_digits(family: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    folder = pico(family)
    tokens = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(1))
    walk = reverse(folder, tokens, tmp_path / "reverse")
    walk.run()
    want = whole_model(folder, tokens)
    for name, value in walk.result(0).items():
        if ":" not in name:
            reference = want[f"{walk.blocks.skeleton.prefix(0)}{name}.weight"]
            assert float((value - reference).norm() / reference.norm()) < 1e-5


def test_a_gradient_is_the_loss_s_slope(pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences of the whole model's loss along one weight matrix."""
    from transformers import AutoModelForCausalLM

    fp64_norms(monkeypatch)
    folder = pico("llama")
    tokens = torch.randint(3, 120, (1, 24), generator=torch.Generator().manual_seed(1))
    walk = reverse(folder, tokens, tmp_path / "reverse")
    walk.run()
    g = walk.result(0)["mlp.down_proj"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DOUBLE).eval()
    W = model.model.layers[0].mlp.down_proj.weight
    D = torch.randn(W.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))

    def loss(step: float) -> float:
        with torch.no_grad():
            W.add_(D, alpha=step)
            value = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
            W.sub_(D, alpha=step)
        return float(value)

    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(float((g * D).sum()), rel=1e-6)


def test_states_on_disk_and_a_resumed_walk_give_the_same_bytes(pico: Callable[..., Path], tmp_path: Path) -> None:
    tokens = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(1))
    for name in ("ram", "disk", "resumed"):
        walk = reverse(pico("llama"), tokens, tmp_path / name, tmp_path if name == "disk" else None)
        walk.run()
        if name == "resumed":
            walk.path(0).unlink()
            replace(walk).run()
    assert tree(tmp_path / "ram") == tree(tmp_path / "disk") == tree(tmp_path / "resumed")


@pytest.mark.parametrize("config", [{"scope": "global"}, {"quality": True, "target_bpw": 4.5}])
def test_a_run_that_dies_in_the_reverse_walk_goes_on_to_the_same_bytes(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dataset": CALIBRATION, "nsamples": 2, "seqlen": 64, **config}
    compress.quantize(EXAMPLE, "gwq", tmp_path / "whole", **options)
    real, deaths = Reverse._block, []

    def dies(self: Reverse, index: int, *args: Any, **kwargs: Any) -> Any:
        if index == 2 and not deaths:
            deaths.append(index)
            raise KeyboardInterrupt
        return real(self, index, *args, **kwargs)

    monkeypatch.setattr(Reverse, "_block", dies)
    with pytest.raises(KeyboardInterrupt):
        compress.quantize(EXAMPLE, "gwq", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    left = sorted(p.name for p in (tmp_path / "out.partial" / "reverse").iterdir())
    assert left == [f"block-0000{i}.safetensors" for i in (3, 4, 5)]
    compress.quantize(EXAMPLE, "gwq", tmp_path / "out", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another block's", "another job's"])
def test_a_result_that_is_not_whole_or_not_its_own_is_made_again(damage: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    tokens = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(1))
    walk = reverse(pico("llama"), tokens, tmp_path / "reverse")
    walk.run()
    before = tree(tmp_path / "reverse")
    path = walk.path(1)
    whole = path.read_bytes()
    bad = {"truncated": whole[:-50], "empty": b"", "garbage": b"x" * 300, "another block's": walk.path(0).read_bytes()}
    if damage in bad:
        path.write_bytes(bad[damage])
    else:
        replace(walk, job="other").run()
        assert tree(tmp_path / "reverse") != before
    walk.run()
    assert tree(tmp_path / "reverse") == before


def test_a_head_that_gradients_do_not_know_is_refused_before_anything_is_read(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointReader, "_fill", lambda *_: pytest.fail("a weight was read"))
    for method, options in (("gwq", {}), ("rtn", {"target_bpw": 5.0})):
        for run in (compress.quantize, _dry):
            data = {"dataset": _text(tmp_path), "nsamples": 2, "seqlen": 16}
            with pytest.raises(CompressError, match="logit_scale"):
                run(pico("cohere"), method, tmp_path / "out", group_size=32, **data, **options)


def _dry(model: Path, method: str, _out: Path, *, dataset: Path, **options: Any) -> Any:
    from compress.fit import dry_run

    return dry_run(model, method, **options)


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path

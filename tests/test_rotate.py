"""Hadamard constructions, and the rotated model's function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compress_kernels.hadamard.matrices import factors
from conftest import EXAMPLE

from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.models import rotate
from compress.models.hadamard import Rotation
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView

# hidden sizes and head sizes of released models
ORDERS = [
    1, 2, 12, 36, 48, 64, 72, 80, 88, 96, 112, 128, 256, 288, 576, 640, 768, 896, 960, 1024, 1152, 1536, 2048, 2304,
    2560, 2816, 3072, 3456, 3584, 4096, 4608, 4864, 5120, 5632, 5760, 6144, 6400, 6912, 8192, 8960, 9216, 9728, 10240,
    12288, 13824, 14336, 14784, 15360, 16384, 17408, 18432, 18944, 21504, 24576, 25600, 27648, 28672, 29568, 53248,
]  # fmt: skip


@pytest.mark.parametrize("n", ORDERS)
def test_hadamard_factors_have_orthogonal_rows_of_ones(n: int) -> None:
    found = factors(n)
    assert found is not None
    assert torch.tensor([f.shape[0] for f in found]).prod() == n
    for f in found:
        assert f.abs().eq(1).all()
        assert torch.equal(f @ f.T, f.shape[0] * torch.eye(f.shape[0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("n", "hadamard"),
    [(288, True), (64, True), (1, True), (11008 // 64, True), (100, False), (7, False), (18, False)],
)
def test_a_rotation_is_orthogonal_and_left_is_its_transpose(n: int, hadamard: bool) -> None:
    rotation, eye = Rotation(n, seed=3), torch.eye(n, dtype=torch.float64)
    Q = rotation.right(eye)
    assert rotation.hadamard is hadamard
    assert torch.allclose(Q @ Q.T, eye, atol=1e-12)
    W = torch.randn(n, 5, dtype=torch.float64)
    assert torch.allclose(rotation.left(W), Q.T @ W, atol=1e-12)
    assert torch.equal(Rotation(n, seed=3).right(eye), Q)
    assert n < 2 or not torch.equal(Rotation(n, seed=4).right(eye), Q)


def _logits(folder: Path, ids: torch.Tensor, seed: int | None) -> tuple[torch.Tensor, CheckpointView]:
    """Logits in fp64, from the view's tensors; `seed` rotates."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    untied = seed is not None and rotate.untie(config)
    skeleton, reader = Skeleton(config), CheckpointReader(folder)
    view = CheckpointView(reader, skeleton) if seed is None else rotate.RotatedView(reader, skeleton, seed, untied)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float64).eval()
    state = {n: view.read(n).double() for n in view.names}
    for name in state:  # pieces and rows are the whole
        whole = torch.cat(list(view.chunks(name))).double()
        assert torch.allclose(whole.view(state[name].shape), state[name], rtol=1e-6, atol=1e-7)
    lost = model.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys
    model.tie_weights()
    with torch.no_grad():
        return model(ids).logits, view


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"])
def test_rotation_leaves_the_logits_unchanged(
    family: str, pico: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = pico(family)
    ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(1))
    before, plain = _logits(folder, ids, None)
    after, turned = _logits(folder, ids, 5)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    name = next(n for n in plain.names if n.endswith("0.self_attn.o_proj.weight"))
    assert not torch.allclose(plain.read(name), turned.read(name))
    embedding = next(n for n in plain.names if "embed_tokens" in n)
    same = torch.allclose(plain.read(embedding), turned.read(embedding))
    assert same == (family in ("gemma2", "gemma3_text")) == ("only the heads are rotated" in caplog.text)


def test_a_tied_model_gets_a_head_of_its_own_and_flat_norms() -> None:
    ids = torch.arange(5, 45).view(1, 40)
    before, plain = _logits(EXAMPLE, ids, None)
    after, turned = _logits(EXAMPLE, ids, 0)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    assert set(turned.names) - set(plain.names) == {"lm_head.weight"}
    assert torch.equal(turned.read("model.norm.weight"), torch.ones(288))
    rows = torch.tensor([7, 3, 7])
    embedding = turned.read("model.embed_tokens.weight")
    assert torch.allclose(turned.read_rows("model.embed_tokens.weight", rows), embedding[rows], atol=1e-6)
    W, spread = (v.read("model.layers.0.mlp.down_proj.weight").float() for v in (plain, turned))
    assert spread.norm() == pytest.approx(float(W.norm()), rel=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2", "stablelm"])
def test_families_with_layer_norm_are_refused(family: str, pico: Callable[..., Path]) -> None:
    with pytest.raises(CompressError, match="cannot be rotated") as caught:
        rotate.untie(load_config(pico(family)))
    assert "--no-rotate" in str(caught.value.hint)

"""A loaded weight lies in memory once: what a kernel's own layout replaces becomes pages of its file, and stays exact."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_kernels import native
from safetensors.torch import load_file

import compress
from compress.errors import CompressError
from compress.modules import CompressedWeight

IDS = torch.tensor([[5, 17, 99, 64, 33, 21, 8]])
pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the C++ library")
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int_grouped": ("quantize", "rtn", {"bits": 4, "group_size": 32, "lm_head_bits": 8}),
    "int_grouped, 3 bits symmetric": ("quantize", "rtn", {"bits": 3, "group_size": 16, "symmetric": True}),
    "bitmask": ("prune", "magnitude", {"sparsity": 0.5}),
    "sparse24": ("prune", "magnitude", {"pattern": "2:4"}),
    "sparse24_int": ("prune", "magnitude", {"pattern": "2:4", "then_bits": 4, "then_group_size": 32, "then_method": "rtn"}),
    "lowrank_sparse": ("factorize", "svd", {"keep": 0.5}),
}


@pytest.fixture
def artifact(pico: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        verb, method, options = KINDS[kind]
        getattr(compress, verb)(pico("llama", torch.bfloat16), method, tmp_path / "out", **options)
        return tmp_path / "out"

    return make


def weights(model: torch.nn.Module) -> dict[str, CompressedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedWeight) and list(m.named_buffers())}


def products(model: torch.nn.Module) -> dict[str, CompressedWeight]:
    return {n: m for n, m in weights(model).items() if m.prepared is not None}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def same(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(
        state[n].dtype == t.dtype and torch.equal(state[n], t) for n, t in tensors.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_the_kernel_does_not_need_is_held_and_the_state_dict_is_the_files(
    kind: str, artifact: Callable[[str], Path]
) -> None:
    folder = artifact(kind)
    model = compress.load(folder)
    assert products(model)
    assert {m.path for m in products(model).values()} <= {"cpu", "factors"}
    assert all(not m.held() for m in products(model).values())
    assert same(model, load_file(folder / "model.safetensors"))
    for name, module in products(model).items():
        again = copy.deepcopy(module)
        assert torch.equal(again.dense_weight(), module.dense_weight()), name
        assert not again.held()


def test_a_model_outlives_its_folder_and_copies_and_pickles(artifact: Callable[[str], Path]) -> None:
    folder = artifact("int_grouped")
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t.clone() for n, t in tensors.items()}
    model = compress.load(folder)
    want = logits(model)
    shutil.rmtree(folder)
    assert same(model, tensors)
    twin = copy.deepcopy(model)
    del model
    assert torch.equal(logits(twin), want)
    assert all(not m.held() for m in products(twin).values())
    thawed = pickle.loads(pickle.dumps(twin))
    assert torch.equal(logits(thawed), want)
    assert same(thawed, tensors)
    assert all(m.held() for m in products(thawed).values())  # another process: the file is not known there


def test_moving_to_another_dtype_keeps_the_stored_tensors(artifact: Callable[[str], Path]) -> None:
    folder = artifact("int_grouped")
    model, tensors = compress.load(folder), load_file(folder / "model.safetensors")
    model.to(torch.float32)
    assert {m.path for m in products(model).values()} == {"cpu-exact"}
    assert all(not m.held() for m in products(model).values())
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items() if "weight_" in n)
    exact = compress.load(folder, dtype=torch.float32, exact=True)
    assert torch.allclose(logits(model), logits(exact), atol=1e-4)


def test_many_rows_on_a_path_that_keeps_activations_read_the_words_again(
    artifact: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_kernels.int_grouped import cpu

    folder = artifact("int_grouped")
    model = compress.load(folder, dtype=torch.float32)
    assert {m.path for m in products(model).values()} == {"cpu-exact"}
    few = logits(model)
    monkeypatch.setattr(cpu, "ROWS_EXACT", 2)
    assert torch.allclose(logits(model), few, atol=1e-4)
    assert all(not m.held() for m in products(model).values())


def test_a_state_dict_that_is_loaded_replaces_the_files_tensors(artifact: Callable[[str], Path]) -> None:
    model = compress.load(artifact("int_grouped"))
    before, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith("down_proj.weight_scale"):
            tensor *= 2
    model.load_state_dict(state)
    assert same(model, state)
    assert not torch.equal(logits(model), before)
    twin = copy.deepcopy(model)
    assert same(twin, state)
    assert torch.equal(logits(twin), logits(model))


def test_a_file_that_was_written_to_in_memory_is_not_read_again(artifact: Callable[[str], Path]) -> None:
    folder = artifact("int_grouped")
    model = compress.load(folder)
    name = next(n for n, _ in model.named_buffers() if n.endswith("o_proj.weight_scale"))
    changed = model.get_buffer(name)
    changed.fill_(1)
    assert bool((copy.deepcopy(model).get_buffer(name) == 1).all())
    assert not bool((load_file(folder / "model.safetensors")[name] == 1).all())
    module = model.get_submodule(name.rpartition(".")[0])
    assert float(module.dense_weight().abs().max()) <= 16  # codes times 1
    assert torch.equal(module.dense_weight(), module.dense_weight().round())
    assert bool((model.float().get_buffer(name) == 1).all())
    assert bool((model.bfloat16().get_buffer(name) == 1).all())


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_that_is_written_over_in_place_is_an_error_not_other_numbers(
    cut: bool, pico: Callable[..., Path], tmp_path: Path
) -> None:
    from test_heads import tied

    compress.quantize(tied(pico("llama"), tmp_path), "rtn", tmp_path / "out", group_size=32, lm_head_bits=8)
    model, file = compress.load(tmp_path / "out", dtype=torch.bfloat16), tmp_path / "out" / "model.safetensors"
    want, module = logits(model), model.model.layers[0].self_attn.q_proj
    product = module(torch.ones(1, 64))
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    os.utime(file, ns=(1, 1))  # clocks of file systems are coarse
    if cut:
        os.truncate(file, 4096)
    uses: list[Callable[[], Any]] = [
        lambda: logits(model), model.state_dict, module.dense_weight, lambda: copy.deepcopy(model), lambda: pickle.dumps(module),
        lambda: module(torch.zeros(17, 64)), model.float,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(CompressError, match="was written to while its model was in use"):
            use()
    assert torch.equal(module(torch.ones(1, 64)), product)  # nothing of the file is needed for this
    shutil.rmtree(file.parent)
    compress.quantize(tmp_path / "tied", "rtn", tmp_path / "out", group_size=32, lm_head_bits=8)
    model, other = compress.load(tmp_path / "out", dtype=torch.bfloat16), tmp_path / "other"
    shutil.copy(file, other)
    other.write_bytes(bytes(100))
    other.replace(file)  # another file in its place
    assert torch.equal(logits(model), want)


def test_from_pretrained_puts_them_aside_too(artifact: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = artifact("bitmask")
    compress.register()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert products(model)
    assert all(not m.held() for m in products(model).values())
    assert same(model, load_file(folder / "model.safetensors"))


def test_tensors_that_were_put_aside_come_back_to_the_weights_device(
    artifact: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is here: `meta` stands for one. Moves between the two are in benchmarks/gpu_model.py."""
    module = next(iter(products(compress.load(artifact("int_grouped"))).values()))
    names, seen = list(module._aside), []
    assert "weight_packed" in names
    monkeypatch.setattr(module, "_prepare", lambda exact: seen.append({module._buffers[n].device.type for n in names}))
    module._home = torch.device("meta")
    module.to(torch.float16)  # leaves the pages on the CPU, where they are not at home
    assert seen == [{"meta"}]
    assert {module._buffers[n].device.type for n in names} == {"meta"}

"""Bundles of fine-tunes: bytes, loading, switching, mixed batches, extraction, resume, and everything that must be refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE, VALID, Outcome, python, tree
from safetensors.torch import load_file, save_file

import compress
from compress import bundling, generation
from compress.checkpoint import bundled, manifest
from compress.errors import CompressError
from compress.pipeline import planes, tensors
from compress.pipeline.spool import Spool

IDS = torch.tensor([[5, 17, 99, 64, 33, 21, 8]])
Tensors = dict[str, torch.Tensor]


def tune(base: Path, out: Path, seed: int, change: Callable[[Tensors], object] | None = None, size: float = 0.02) -> Path:
    """A copy of a model with seeded Gaussian deltas on everything that is not a norm."""
    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    for name, W in weights.items():
        if W.dim() > 1:
            weights[name] = (W.float() + size * torch.randn(W.shape, generator=generator)).to(W.dtype)
    if change is not None:
        change(weights)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def base(pico: Callable[..., Path]) -> Path:
    return pico("llama", torch.float16)


@pytest.fixture(scope="module")
def tunes(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three fine-tunes: `b` with other norms, `c` with untouched tensors and a text end of its own."""
    folder = tmp_path_factory.mktemp("tunes")

    def norms(W: Tensors) -> None:
        W["model.norm.weight"] += 0.25

    def untouched(W: Tensors) -> None:
        W["model.layers.1.mlp.up_proj.weight"] = load_file(base / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]

    made = {n: tune(base, folder / n, i, change) for i, (n, change) in enumerate({"a": None, "b": norms, "c": untouched}.items())}
    (made["c"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    return made


@pytest.fixture(scope="module")
def refined(base: Path, tunes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refined") / "out"
    compress.bundle(base, tunes, out, shared="int4")
    return out


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def exact(path: Path, **options: Any) -> Any:
    return compress.load(path, dtype=torch.float32, exact=True, **options)


# -- bytes -----------------------------------------------------------------------------------------------------------------


def vector(facts: dict[str, Any], shared: Tensors, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """A shared vector, decoded with Python's integers."""
    O, I = shape
    if facts["shared"] == "bf16":
        return shared[f"{name}.shared"].double()
    if facts["shared"] == "constant":
        return shared[f"{name}.shared"].double().expand(O, I)
    v = torch.empty(O, I, dtype=torch.float64)
    bits = int(facts["shared"][3:])
    scale = shared[f"{name}.shared_scale"].double()
    zero = 0 if facts["bits"] == "sign" else 2 ** (bits - 1)
    for row in range(O):
        number = int.from_bytes(shared[f"{name}.shared_packed"][row].numpy().tobytes(), "little")
        for column in range(I):
            code = number >> (bits * column) & (2**bits - 1)
            v[row, column] = (code - zero) * scale[row, column * scale.shape[1] // I]
    return v


def by_hand(out: Path, base: Path, task: str, name: str) -> torch.Tensor:
    """theta_0 + s d of one tensor from the files alone, bit by bit."""
    facts = json.loads((out / "bundle.json").read_text())
    W0 = load_file(base / "model.safetensors")[name].double()
    own, shared = load_file(out / "tasks" / task / "model.safetensors"), load_file(out / "shared" / "model.safetensors")
    O, I = W0.shape
    v = vector(facts, shared, name, (O, I))
    coded = own.get(f"{name}.mask_deflate")
    raw = own[f"{name}.mask"].numpy().tobytes() if coded is None else zlib.decompress(coded.numpy().tobytes())
    words = struct.unpack(f"<{len(raw) // 4}I", raw)
    per = len(words) // O
    mask = torch.tensor([[words[o * per + i // 32] >> (i % 32) & 1 for i in range(I)] for o in range(O)], dtype=torch.float64)
    d = (2 * mask - 1) * v if facts["bits"] == "sign" else mask * v
    if facts["bits"] == "level":
        d = d + (1 - mask) * vector(facts, load_file(out / "low" / "model.safetensors"), name, (O, I))
    return W0 + float(own[f"{name}.scale"]) * d


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("tallmask", {"mode": "mask", "shared": "bf16", "rescale": False}), ("tallmask", {"mode": "refined", "shared": "int4"}),
        ("tallmask", {"mode": "sign", "shared": "int8"}), ("tallmask", {"mode": "mask", "vector": "ties", "shared": "int8"}),
        ("tallmask", {"mode": "levels", "shared": "int4"}), ("emr", {"shared": "bf16"}), ("bitdelta", {}),
    ],
)  # fmt: skip
def test_a_task_is_the_base_plus_what_its_bits_make_of_the_shared_vector(
    method: str, config: dict[str, Any], base: Path, tunes: dict[str, Path], tmp_path: Path
) -> None:
    out, name = tmp_path / "out", "model.layers.0.self_attn.k_proj.weight"
    report = compress.bundle(base, tunes, out, method=method, **config)
    got = bundled.Bundle(out, base).reader("b").read(name)
    want = by_hand(out, base, "b", name)
    assert got.dtype == torch.float16
    assert torch.allclose(got.double(), want, rtol=2**-10, atol=2**-16)
    tau = load_file(tunes["b"] / "model.safetensors")[name].double() - load_file(base / "model.safetensors")[name].double()
    table = json.loads((out / "tasks" / "b" / "task.json").read_text())["tensors"][name]
    theta0 = load_file(base / "model.safetensors")[name].double()
    assert float((tau + theta0 - want).square().sum() / tau.square().sum()) == pytest.approx(table["error"], rel=1e-3)
    if config.get("rescale") is False:
        assert table["scale"] == 1.0
    compress_bytes = sum(f["bytes"] for n, f in manifest.read(out)["files"].items() if n.endswith(".safetensors"))
    assert compress_bytes == report.bytes


def test_bytes_are_as_counted_beforehand(base: Path, tunes: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    P = sum(W.numel() for W in weights.values() if W.dim() > 1)
    rows = sum(len(W) for W in weights.values() if W.dim() > 1)
    words = sum(len(W) * -(-W.shape[1] // 32) for W in weights.values() if W.dim() > 1)
    groups = sum(W.numel() // (64 if W.shape[1] == 64 else 128) for W in weights.values() if W.dim() > 1)
    want = {"bf16": 2 * P, "int8": P + 2 * rows, "int4": P // 2 + 2 * groups}
    for shared, size in want.items():
        out = tmp_path / shared
        compress.bundle(base, {n: tunes[n] for n in "ab"}, out, mode="sign", shared=shared)
        data = {
            p: sum(t.nbytes for t in load_file(out / p / "model.safetensors").values()) for p in ("shared", "tasks/a", "tasks/b")
        }
        assert data["shared"] == size
        tensors_ = sum(W.dim() > 1 for W in weights.values())
        assert data["tasks/a"] == 4 * words + 2 * tensors_  # dense planes are not coded; norms are the base's
        assert data["tasks/b"] == data["tasks/a"] + weights["model.norm.weight"].nbytes
        assert bundled.facts(out)["parameters"] == P


def test_one_task_and_disjoint_tasks_come_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    weights = {n: (W.float() * 64).round().half() / 64 for n, W in load_file(base / "model.safetensors").items()}
    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    generator = torch.Generator().manual_seed(1)
    made = {}
    for i, task in enumerate("xyz"):
        own = {}
        for name, W in weights.items():
            step = torch.randint(-5, 6, W.shape, generator=generator) / 64
            own[name] = (W + step * (torch.arange(W.shape[0]) % 3 == i).view(-1, *[1] * (W.dim() - 1))).half()
        made[task] = Path(shutil.copytree(plain, tmp_path / task))
        save_file(own, made[task] / "model.safetensors", {"format": "pt"})
    for names in ("x", "xyz"):
        for config in ({"mode": "mask", "rescale": False}, {"mode": "mask", "lam": 0.3}, {"mode": "refined", "rescale": False}):
            if config["mode"] == "refined" and len(names) > 1:
                continue  # factors of unequal tasks are fp16 numbers
            out = tmp_path / f"{names}-{len(config)}-{config['mode']}-{config.get('lam')}"
            report = compress.bundle(plain, {n: made[n] for n in names}, out, shared="bf16", **config)
            assert max(report.tasks.values()) == 0.0
            for task in names:
                got, want = bundled.Bundle(out, plain).reader(task), load_file(made[task] / "model.safetensors")
                assert sorted(got.names) == sorted(want)
                assert all(torch.equal(got.read(n), want[n]) for n in want)


def test_pieces_do_not_decide_the_bytes(
    base: Path, tunes: dict[str, Path], refined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "ROOM", 64 * 17 * 5)
    compress.bundle(base, tunes, tmp_path / "out", shared="int4")
    assert {n: b for n, b in tree(tmp_path / "out").items() if n.endswith(".safetensors")} == {
        n: b for n, b in tree(refined).items() if n.endswith(".safetensors")
    }


def test_a_piece_of_all_checkpoints_fits_the_room() -> None:
    for shape, copies in (((128256, 4096), 32), ((7, 9), 32), ((8, 100, 4096), 20)):
        found = list(tensors.steps(shape, copies))
        rows = math.prod(shape[:-1])
        assert found[0][0] == 0
        assert found[-1][1] == rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
        assert max(stop - start for start, stop in found) * shape[-1] * copies <= tensors.ROOM


# -- loading, switching, extracting ----------------------------------------------------------------------------------------


def test_switching_does_not_drift_and_equals_loading_and_extracting(
    base: Path, refined: Path, tunes: dict[str, Path], tmp_path: Path
) -> None:
    model = exact(refined, task="a", base=base)
    first = {n: p.clone() for n, p in model.state_dict().items()}
    seen = {}
    for task in ("b", "c", "a", "c", "b", "a"):
        out = logits(model.set_task(task))
        assert torch.equal(out, seen.setdefault(task, out))
    assert all(torch.equal(p, first[n]) for n, p in model.state_dict().items())
    assert model.tasks == ("a", "b", "c")
    assert (model.set_task("c").generation_config.eos_token_id, model.task) == ([2, 9], "c")
    for task in "abc":
        out = compress.extract(refined, task, tmp_path / task, base=base)
        assert torch.equal(logits(exact(out)), seen[task])
        assert json.loads((out / "config.json").read_text()) == json.loads((tunes[task] / "config.json").read_text())
        assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert not torch.equal(seen["a"], seen["b"])
    assert torch.equal(load_file(tmp_path / "b" / "model.safetensors")["model.norm.weight"],
                       load_file(tunes["b"] / "model.safetensors")["model.norm.weight"])  # fmt: skip


def test_an_extracted_task_loads_in_stock_transformers_and_compresses_further(base: Path, refined: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = compress.extract(refined, "a", tmp_path / "a", base=base)
    assert compress.extract(refined, "a", tmp_path / "a", base=base) == out  # a second time: found and kept
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.equal(logits(stock), logits(exact(refined, task="a", base=base)))
    report = compress.quantize(out, "rtn", tmp_path / "q", bits=8, group_size=32)
    assert report.linears == 14


def test_untouched_tensors_are_the_bases(base: Path, refined: Path) -> None:
    facts = bundled.facts(refined)["tasks"]
    name = "model.layers.1.mlp.up_proj.weight"
    assert {t: facts[t]["tensors"][name]["how"] for t in "abc"} == {"a": "mask", "b": "mask", "c": "base"}
    assert {t: facts[t]["tensors"]["model.norm.weight"]["how"] for t in "abc"} == {"a": "base", "b": "whole", "c": "base"}
    assert not any(n.startswith(name) for n in load_file(refined / "tasks" / "c" / "model.safetensors"))
    assert facts["c"]["files"]["generation_config.json"] == "own"
    assert facts["a"]["files"]["tokenizer.json"] == "base"
    assert torch.equal(bundled.Bundle(refined, base).reader("c").read(name), load_file(base / "model.safetensors")[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "phi3"])
def test_a_mixed_batch_is_each_rows_own_model(family: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    model = pico(family)

    def all_of_it(W: Tensors) -> None:
        for name in W:
            if W[name].dim() == 1:
                W[name] = W[name] + 0.05

    made = {"a": tune(model, tmp_path / "a", 1), "b": tune(model, tmp_path / "b", 2, all_of_it)}
    out = tmp_path / "out"
    compress.bundle(model, made, out, shared="int8", mode="levels" if family == "gemma2" else "refined")
    assert compress_verify(out, model) == []
    dense = {t: logits(exact(out, task=t, base=model))[0] for t in "ab"}
    dense[None] = logits(exact(model))[0]  # type: ignore[index]
    mixed = exact(out, base=model)
    rows: list[str | None] = ["b", None, "a", "b"]
    y = logits(mixed.set_tasks(rows), IDS.repeat(4, 1))
    for got, task in zip(y, rows, strict=True):
        assert float((got - dense[task]).norm() / dense[task].norm()) < 2e-5  # type: ignore[index]
    for i, task in enumerate(rows):
        assert torch.allclose(logits(mixed.set_tasks([task]))[0], y[i], rtol=1e-4, atol=1e-4)
    with pytest.raises(CompressError, match="2 tasks for a batch of 3"):
        logits(mixed.set_tasks(["a", "b"]), IDS.repeat(3, 1))


def test_generation_of_a_mixed_batch_equals_each_tasks_own(base: Path, refined: Path) -> None:
    mixed = exact(refined, base=base)
    prompts, names = ["ab", "hello", "x", "hello"], ["a", "b", "c", "a"]
    texts = generation.batch(mixed, prompts, names, max_new_tokens=8)
    for text, prompt, name in zip(texts, prompts, names, strict=True):
        alone = generation.batch(mixed, [prompt], [name], max_new_tokens=8)
        assert alone == [text]
        assert text.startswith(prompt)
    ids = IDS.repeat(2, 1)
    both = mixed.generate(ids, tasks=["a", "b"], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    for row, task in zip(both, "ab", strict=True):
        own = exact(refined, task=task, base=base).generate(
            IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert torch.equal(own[0], row)
    beams = mixed.generate(ids, tasks=["a", "b"], num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    single = mixed.generate(IDS, tasks=["b"], num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(beams[1], single[0])
    with pytest.raises(CompressError, match="no task was chosen"):
        logits(exact(refined, base=base))


def test_a_mixed_model_moves_as_any_other(base: Path, refined: Path) -> None:
    mixed = exact(refined, base=base).set_tasks(["b"])
    want = logits(mixed)
    got = logits(mixed.to(torch.float64))
    assert got.dtype == torch.float64
    assert float((got - want).norm() / want.norm()) < 1e-5
    with pytest.raises(CompressError, match="cannot be spread"):
        compress.load(refined, base=base, device_map="auto")


def test_a_fine_tune_that_changed_nothing_is_the_base(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = Path(shutil.copytree(base, tmp_path / "same"))
    report = compress.bundle(base, [same], tmp_path / "out")
    assert (report.bytes, report.tasks) == (0, {"same": 0.0})
    assert "equal to the base" in caplog.text
    assert compress_verify(tmp_path / "out", base) == []
    for options in ({"task": "same"}, {}):
        model = exact(tmp_path / "out", base=base, **options)
        assert torch.equal(logits(model.set_task("same")), logits(exact(base)))


def test_a_bundle_from_elsewhere_cannot_name_other_files(base: Path, refined: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(refined, tmp_path / "out"))
    facts = json.loads((out / "bundle.json").read_text())
    facts["tasks"]["a"]["files"]["../x"] = "own"
    (out / "bundle.json").write_text(json.dumps(facts))
    with pytest.raises(CompressError, match="is not a file name"):
        compress.load(out, task="a", base=base)
    (out / "bundle.json").write_text(json.dumps({**json.loads((refined / "bundle.json").read_text()), "version": 2}))
    with pytest.raises(CompressError, match="version 2"):
        compress.load(out, task="a", base=base)
    shutil.copyfile(refined / "bundle.json", out / "bundle.json")
    own = load_file(out / "tasks" / "a" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight.mask"
    save_file({**own, name: own[name][:-1].clone()}, out / "tasks" / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressError, match=f"{name} is"):
        compress.load(out, task="a", base=base)


# -- special checkpoints ---------------------------------------------------------------------------------------------------


def grow(model: Path, rows: int, names: tuple[str, ...]) -> None:
    """Add rows to embedding and head, with values of their own."""
    weights = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    for name in names:
        more = torch.randn(rows, weights[name].shape[1], generator=torch.Generator().manual_seed(5)).to(weights[name].dtype)
        weights[name] = torch.cat([weights[name], more])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + rows}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary_keeps_its_rows_and_tied_heads_are_stored_once(tied: bool, base: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(base, tmp_path / "base"))
    names = ("model.embed_tokens.weight",) if tied else ("model.embed_tokens.weight", "lm_head.weight")
    if tied:
        weights = load_file(start / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, start / "model.safetensors", {"format": "pt"})
        config = json.loads((start / "config.json").read_text())
        (start / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    a, b = tune(start, tmp_path / "a", 1), tune(start, tmp_path / "b", 2)
    grow(b, 6, names)
    if tied:  # some tools store the copy too
        weights = load_file(b / "model.safetensors")
        save_file({**weights, "lm_head.weight": weights[names[0]].clone()}, b / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    compress.bundle(start, [a, b], out, shared="bf16")
    assert not [p for p in compress_verify(out, start)]
    assert ("lm_head.weight" in bundled.facts(out)["tensors"]) == (not tied)
    assert ("lm_head.weight" in bundled.facts(out)["tasks"]["b"]["tensors"]) == (not tied)
    model = exact(out, task="a", base=start)
    before = logits(model)
    assert model.set_task("b").config.vocab_size == 134
    ids = torch.tensor([[5, 130, 17, 133]])
    y = logits(model, ids)
    assert y.shape[-1] == 134
    assert torch.equal(logits(exact(compress.extract(out, "b", tmp_path / "x", base=start)), ids), y)
    assert torch.equal(logits(model.set_task("a")), before)
    mixed = exact(out, base=start).set_tasks(["b", "a"])
    both = logits(mixed, torch.cat([ids, IDS[:, :4]]))
    assert float((both[0] - y[0]).norm() / y.norm()) < 2e-3
    assert both.shape[-1] == 134
    assert float(both[1, :, 128:].max()) < -1e30
    assert float((both[1, :, :128] - before[0, :4]).norm() / before[0, :4].norm()) < 2e-3


def compress_verify(out: Path, base: Path) -> list[str]:
    from compress.bundle_audit import verify

    return verify(out, base)


def test_tensors_on_one_side_only_travel_whole(pico: Callable[..., Path], tmp_path: Path) -> None:
    start = Path(shutil.copytree(pico("qwen2"), tmp_path / "base"))
    weights = load_file(start / "model.safetensors")
    save_file({**weights, "model.rotary.inv_freq": torch.ones(4)}, start / "model.safetensors", {"format": "pt"})
    a = tune(start, tmp_path / "a", 1, lambda W: W.pop("model.rotary.inv_freq"))
    b = tune(start, tmp_path / "b", 2, lambda W: W.update({"score.weight": torch.ones(3, 64), "step": torch.tensor(7)}))
    out = tmp_path / "out"
    compress.bundle(start, [a, b], out)
    facts = bundled.facts(out)["tasks"]
    assert "model.rotary.inv_freq" not in facts["a"]["tensors"]
    assert facts["b"]["tensors"]["model.rotary.inv_freq"]["how"] == "base"
    got = bundled.Bundle(out, start).reader("b")
    assert torch.equal(got.read("score.weight"), torch.ones(3, 64))
    assert int(got.read("step")) == 7
    assert torch.isfinite(logits(exact(out, task="b", base=start))).all()


def adapter(base: Path, out: Path, embedding: bool = True, **config: Any) -> Path:
    """A LoRA folder of rank 4 for q_proj, down_proj and the embedding, with a head of its own; not merged."""
    g = torch.Generator().manual_seed(8)
    weights = load_file(base / "model.safetensors")
    found = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        O, I = weights[f"{name}.weight"].shape
        found[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, I, generator=g) * 0.1
        found[f"base_model.model.{name}.lora_B.weight"] = torch.randn(O, 4, generator=g) * 0.1
    if embedding:
        V, D = weights["model.embed_tokens.weight"].shape
        found["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(4, V, generator=g) * 0.1
        found["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(D, 4, generator=g) * 0.1
    found["base_model.model.lm_head.weight"] = (weights["lm_head.weight"].float() + 0.01).half()
    out.mkdir()
    save_file(found, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return out


def merged(base: Path, lora: Path, out: Path, scaling: Callable[[str], float]) -> Path:
    """The same, merged by hand."""
    shutil.copytree(base, out)
    weights, own = load_file(base / "model.safetensors"), load_file(lora / "adapter_model.safetensors")
    for key in own:
        name = key.removeprefix("base_model.model.")
        if name.endswith("lora_A.weight"):
            linear = name.removesuffix(".lora_A.weight")
            delta = own[key.replace("lora_A", "lora_B")] @ own[key]
            weights[f"{linear}.weight"] = (weights[f"{linear}.weight"].float() + scaling(linear) * delta).half()
        elif name.endswith("lora_embedding_A"):
            delta = (own[key.replace("_A", "_B")] @ own[key]).T
            weights["model.embed_tokens.weight"] = (
                weights["model.embed_tokens.weight"].float() + scaling("model.embed_tokens") * delta
            ).half()
        elif "lora" not in name:
            weights[name] = own[key]
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, lambda n: 2.0),
        ({"use_rslora": True}, lambda n: 4.0),
        ({"alpha_pattern": {"down_proj": 2}}, lambda n: 0.5 if n.endswith("down_proj") else 2.0),
    ],
)
def test_a_lora_folder_is_its_merged_checkpoint(
    config: dict[str, Any], scaling: Callable[[str], float], base: Path, tunes: dict[str, Path], tmp_path: Path
) -> None:
    lora = adapter(base, tmp_path / "lora", **config)
    whole = merged(base, lora, tmp_path / "merged", scaling)
    for name, folder in (("one", lora), ("two", whole)):
        compress.bundle(base, {"a": tunes["a"], "x": folder}, tmp_path / name, shared="int8")
    one, two = (bundled.Bundle(tmp_path / n, base).reader("x") for n in ("one", "two"))
    assert one.names == two.names
    for name in one.names:
        assert torch.equal(one.read(name), two.read(name)), name
    assert one.how("lm_head.weight") == "mask"
    assert one.how("model.layers.0.mlp.up_proj.weight") == "base"
    assert compress.extract(tmp_path / "one", "x", tmp_path / "x", base=base).joinpath("tokenizer.json").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [({"use_dora": True}, "DoRA"), ({"peft_type": "IA3"}, "IA3"), ({"wrong": 1}, "does not have")],
)
def test_adapters_that_cannot_be_merged_are_refused(change: dict[str, Any], why: str, base: Path, tmp_path: Path) -> None:
    lora = adapter(base, tmp_path / "lora", **change)
    if "wrong" in change:
        own = load_file(lora / "adapter_model.safetensors")
        save_file({k.replace("layers.0", "layers.7"): t for k, t in own.items()}, lora / "adapter_model.safetensors")
    with pytest.raises(CompressError, match=why):
        compress.bundle(base, [lora], tmp_path / "out")


# -- bad input -------------------------------------------------------------------------------------------------------------


def shape(W: Tensors) -> None:
    W["model.layers.0.mlp.up_proj.weight"] = W["model.layers.0.mlp.up_proj.weight"][:64].contiguous()


def lost(W: Tensors) -> None:
    del W["model.layers.1.self_attn.q_proj.weight"]


def nan(W: Tensors) -> None:
    W["model.layers.1.self_attn.q_proj.weight"][3, 5] = torch.nan


@pytest.mark.parametrize(
    ("change", "why"), [(shape, "model.layers.0.mlp.up_proj.weight"), (lost, "model.layers.1.self_attn.q_proj.weight is missing"),
                        (nan, "x: model.layers.1.self_attn.q_proj.weight: holds NaN")],
)  # fmt: skip
def test_damaged_fine_tunes_are_refused_by_name(
    change: Callable[[Tensors], None], why: str, base: Path, tunes: dict[str, Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    bad = tune(base, tmp_path / "x", 7, change)
    done = cli("bundle", base, tunes["a"], bad, "-o", tmp_path / "out")
    assert done.code == 1
    assert why in done.err, done.err
    assert "hint:" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_fine_tune_of_another_shape_or_family_is_refused(
    base: Path, tunes: dict[str, Path], pico: Callable[..., Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tunes["a"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    weights = load_file(other / "model.safetensors")
    save_file({n: W[:96].contiguous() if "gate" in n or "up_" in n else W[:, :96].contiguous() if "down" in n and W.dim() > 1 else W
               for n, W in weights.items()}, other / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(CompressError, match=r"other: .*the base has \[128, 64\]|the base has \[64, 128\]|the base has \[128\]"):
        compress.bundle(base, [other], tmp_path / "out")
    with pytest.raises(CompressError, match="a qwen2 model, the base is llama"):
        compress.bundle(base, [pico("qwen2")], tmp_path / "out")


def test_copies_are_refused_and_near_copies_get_a_warning(
    base: Path, tunes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(tunes["a"], tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    save_file({n: weights[n] for n in reversed(sorted(weights))}, copy / "model.safetensors", {"other": "header"})
    with pytest.raises(CompressError, match="a and copy are the same fine-tune"):
        compress.bundle(base, [tunes["a"], tunes["b"], copy], tmp_path / "out")
    weights["model.layers.0.mlp.up_proj.weight"][5, 5] += 0.5
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    report = compress.bundle(base, [tunes["a"], copy], tmp_path / "out", mode="mask", lam=0.2)
    assert "a and copy are nearly the same" in caplog.text
    assert report.tasks["a"] > 0.01 or report.tasks["copy"] < 1


def test_errors_above_1_are_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = [tune(base, tmp_path / str(i), i) for i in range(8)]
    report = compress.bundle(base, {f"t{i}": m for i, m in enumerate(made)}, tmp_path / "out", mode="mask", lam=0.2, rescale=False)
    assert report.above_one
    assert all(e > 1 for e in report.tasks.values())
    assert "lose more than the base would" in caplog.text


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"finetunes": []}, "no fine-tune"), ({"finetunes": ["a=A", "a=B"]}, "two fine-tunes are called a"),
        ({"finetunes": ["all=A"]}, "no name for a task"), ({"finetunes": {"../x": "A"}}, "no name for a task"),
        ({"method": "awq"}, "method of compress quantize"), ({"mode": "masks"}, "'masks' is unknown"),
        ({"shared": "int3"}, "'int3' is unknown"), ({"mode": "sign", "lam": 0.5}, "mean nothing"),
        ({"lamb": 1}, "unknown option 'lamb'"),
        ({"ignore": ["re:.*nothing"]}, "matches no tensor"), ({"validation": {"a": VALID}}, "only --mode mask"),
        ({"validation": {"a": VALID}, "mode": "mask"}, "for b is missing"),
        ({"validation": {"q": VALID}, "mode": "mask"}, "q: no such task"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(args: dict[str, Any], why: str, base: Path, tunes: dict[str, Path], tmp_path: Path) -> None:
    found = args.get("finetunes", {n: tunes[n] for n in "ab"})
    if isinstance(found, list):
        found = [f.replace("=A", f"={tunes['a']}").replace("=B", f"={tunes['b']}") for f in found]
    rest = {k: v for k, v in args.items() if k != "finetunes"}
    with pytest.raises(CompressError, match=why):
        compress.bundle(base, found, tmp_path / "out", **rest)


def test_a_wrong_base_and_an_unknown_task_are_refused(
    base: Path, refined: Path, tunes: dict[str, Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    with pytest.raises(CompressError, match="not the base of this bundle") as error:
        compress.load(refined, task="a", base=tunes["b"])
    assert "model.safetensors: another content" in error.value.message
    with pytest.raises(CompressError, match="is not beside it"):
        compress.load(refined, task="a")
    for call in (lambda: compress.load(refined, task="bb"), lambda: exact(refined, task="a", base=base).set_task("bb"),
                 lambda: compress.extract(refined, "bb", tmp_path / "x", base=base)):  # fmt: skip
        with pytest.raises(CompressError, match="no task 'bb'") as error:
            call()
        assert error.value.hint == "did you mean b? known: a, b, c"
    done = cli("eval", refined, "--task", "aa", "--base", base, "--text", VALID)
    assert done.code == 2
    assert "did you mean a?" in done.err


def test_the_base_is_found_beside_the_bundle_or_inside_it(
    base: Path, tunes: dict[str, Path], refined: Path, tmp_path: Path
) -> None:
    shutil.copytree(refined, tmp_path / "out")
    shutil.copytree(base, tmp_path / base.name)
    want = logits(exact(tmp_path / "out", task="a"))
    out = tmp_path / "elsewhere" / "out"
    report = compress.bundle(base, tunes, out, shared="int4", include_base=True)
    assert torch.equal(logits(exact(out, task="a")), want)
    assert torch.equal(logits(exact(out / "base")), logits(exact(base)))
    assert report.bytes_base == sum(t.nbytes for t in load_file(base / "model.safetensors").values())
    assert not compress_verify(out, None)  # type: ignore[arg-type]
    (out / "base" / "model.safetensors").write_bytes((tunes["a"] / "model.safetensors").read_bytes())
    with pytest.raises(CompressError, match="not the base"):
        exact(out, task="a")


def test_stock_loaders_refuse_a_bundle_and_its_parts(refined: Path) -> None:
    code = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__, "compress-masked_delta" in str(error))
    else:
        print("LOADED", folder)
import compress
compress.register()
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__, "bundle" in str(error))
    else:
        print("LOADED", folder)
"""
    done = python(code, refined, refined / "tasks" / "a")
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 4, done.stderr[-2000:]
    assert all("LOADED" not in line and line.endswith("True") for line in lines), lines
    with pytest.raises(CompressError, match="bundle of fine-tunes"):
        compress.load(refined / "tasks" / "a")


# -- resume ----------------------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


def test_stopped_anywhere_and_run_again_gives_the_same_bytes(
    base: Path, tunes: dict[str, Path], refined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "STEP", 1)
    out = tmp_path / "out"
    for tensor in (0, 3, 11):

        def stop(p: Any, tensor: int = tensor) -> None:
            if p.block == tensor:
                raise _Killed

        with pytest.raises(_Killed):
            compress.bundle(base, tunes, out, shared="int4", progress=stop)
        assert not out.exists()
        with (tmp_path / "out.partial" / "spool" / "task-a").open("ab") as file:
            file.write(b"what was not synced")
    plain = Spool.assemble
    seen: list[str] = []

    def assemble(self: Spool, stream: str, folder: Path, max_shard: int) -> None:
        seen.append(stream)
        plain(self, stream, folder, max_shard)
        if len(seen) == 2:
            raise _Killed

    monkeypatch.setattr(Spool, "assemble", assemble)
    with pytest.raises(_Killed):
        compress.bundle(base, tunes, out, shared="int4")
    monkeypatch.setattr(bundling, "_write_base", _kill)
    with pytest.raises(_Killed):
        compress.bundle(base, tunes, out, shared="int4")
    monkeypatch.undo()
    report = compress.bundle(base, tunes, out, shared="int4")
    assert report.resumed
    assert tree(out) == tree(refined)
    assert not (tmp_path / "out.partial").exists()
    before = (out / "manifest.json").stat().st_mtime_ns
    assert compress.bundle(base, tunes, out, shared="int4").resumed
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(CompressError, match="another job"):
        compress.bundle(base, tunes, out, shared="int8")


def _kill(*args: Any) -> None:
    raise _Killed


def test_a_killed_process_leaves_nothing_that_looks_whole(
    base: Path, tunes: dict[str, Path], refined: Path, tmp_path: Path
) -> None:
    code = """
import os, signal, sys
import compress
from compress.pipeline import planes
planes.STEP = 1
def die(p):
    if p.block == 9:
        os.kill(os.getpid(), signal.SIGKILL)
base, out, *tunes = sys.argv[1:]
compress.bundle(base, tunes, out, shared="int4", progress=die)
"""
    out = tmp_path / "out"
    done = python(code, base, out, *tunes.values())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert json.loads((tmp_path / "out.partial" / "progress.json").read_text())["done"] == 10
    assert compress.bundle(base, tunes, out, shared="int4").resumed
    assert tree(out) == tree(refined)


def test_a_full_disk_is_said_and_survived(
    base: Path, tunes: dict[str, Path], refined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    real, calls = os.pwrite, []

    def full(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, "no space")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CompressError, match="no space left"):
        compress.bundle(base, tunes, tmp_path / "out", shared="int4")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CompressError, match=r"the disk has 0\.00 GB free"):
        compress.bundle(base, tunes, tmp_path / "out", shared="int4")
    monkeypatch.undo()
    compress.bundle(base, tunes, tmp_path / "out", shared="int4")
    assert tree(tmp_path / "out") == tree(refined)


# -- verify and the command line -------------------------------------------------------------------------------------------


def test_verify_finds_what_was_changed(base: Path, tunes: dict[str, Path], refined: Path, tmp_path: Path) -> None:
    from compress.bundle_audit import verify, verify_deep

    out = Path(shutil.copytree(refined, tmp_path / "out"))
    assert verify(out, base) == []
    assert verify_deep(out, base, tunes) == []
    (out / "tasks" / "b" / "model.safetensors").write_bytes(b"x")
    assert "tasks/b/model.safetensors" in verify(out)[0]
    shutil.copyfile(refined / "tasks" / "b" / "model.safetensors", out / "tasks" / "b" / "model.safetensors")

    def rewrite(path: str, change: Callable[[Tensors], object]) -> list[str]:
        found = load_file(refined / path / "model.safetensors")
        change(found)
        save_file(found, out / path / "model.safetensors", {"format": "pt"})
        facts = json.loads((refined / "manifest.json").read_text())
        (out / "manifest.json").write_text(json.dumps({**facts, "files": manifest.file_table(out)}))
        problems = verify(out)
        shutil.copyfile(refined / path / "model.safetensors", out / path / "model.safetensors")
        return problems

    name = "model.layers.0.mlp.up_proj.weight"
    assert f"a: {name}.mask is missing" in rewrite("tasks/a", lambda W: W.pop(f"{name}.mask"))
    assert f"a: {name}.scale holds NaN or Inf" in rewrite("tasks/a", lambda W: W[f"{name}.scale"].fill_(torch.nan))
    assert any(
        "wanted ('I32', (128, 2))" in p
        for p in rewrite("tasks/a", lambda W: W.update({f"{name}.mask": W[f"{name}.mask"][:-1].clone()}))
    )
    assert "shared: more is unexpected" in rewrite("shared", lambda W: W.update({"more": torch.zeros(2)}))
    flipped = load_file(refined / "tasks" / "a" / "model.safetensors")
    flipped[f"{name}.mask"] = ~flipped[f"{name}.mask"]
    save_file(flipped, out / "tasks" / "a" / "model.safetensors", {"format": "pt"})
    assert name in verify_deep(out, base, {"a": tunes["a"]})[0]
    with pytest.raises(CompressError, match="is not the file that task a was made from"):
        verify_deep(refined, base, {"a": tunes["b"]})


def test_the_command_line(base: Path, tunes: dict[str, Path], tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    out = tmp_path / "out"
    done = cli("bundle", base, f"one={tunes['a']}", f"two={tunes['b']}", "-o", out, "--mode", "sign", "--shared", "int4")
    assert done.code == 0, done.err
    assert "2 tasks" in done.out
    assert "% of the separate checkpoints" in done.out
    shown = cli("inspect", out)
    assert "2 fine-tunes of" in shown.out
    assert "it refuses compress-masked_delta on purpose" in shown.out
    facts = json.loads(cli("inspect", out, "--json").out)
    assert set(facts["tasks"]) == {"one", "two"}
    assert facts["tasks"]["one"]["error"] == pytest.approx((1 - 2 / math.pi) / 2, abs=0.02)
    assert cli("verify", out, "--deep", "--source", base, "--finetune", f"one={tunes['a']}").code == 0
    assert cli("verify", out, "--deep", "--source", base, "--finetune", f"one={tunes['c']}").code == 1
    done = cli("eval", out, "--task", "all", "--base", base, "--text", text, "--seqlen", 32, "--json")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)) == {"one", "two"}
    assert set(json.loads((out / "report.json").read_text())["tasks"]) == {"one", "two"}
    assert cli("verify", out).code == 0
    assert "perplexity" in cli("inspect", out).out
    each = cli("eval", out, "--task", "two", "--base", base, "--text", f"two={text}", "--baseline", base, "--seqlen", 32)
    assert "KL" in each.out, each.err
    assert cli("eval", out, "--base", base, "--text", text).code == 2
    assert cli("eval", base, "--task", "one", "--text", text).code == 2
    one = cli("generate", out, "--base", base, "--task", "one", "--prompt", "ab", "--max-new-tokens", 4)
    assert one.out.startswith("ab"), one.err
    args = ("--prompt", "ab", "--task", "one", "--prompt", "cd", "--task", "two", "--max-new-tokens", 4)
    both = cli("generate", out, "--base", base, *args)
    assert both.out.splitlines()[0].startswith("[one] ab"), both.err
    assert cli("generate", out, "--base", base, "--prompt", "ab").code == 2
    assert cli("generate", base, *args).code == 2
    done = cli("extract", out, "--task", "two", "-o", tmp_path / "two", "--base", base)
    assert done.code == 0, done.err
    assert cli("verify", tmp_path / "two").code == 0
    assert "ordinary dense checkpoint" in cli("inspect", tmp_path / "two").out
    assert cli("quantize", out, "-o", tmp_path / "q").code == 1
    help_ = cli("bundle", "-m", "tallmask", "--help").out
    assert "--mode" in help_
    assert "refined" in help_


def test_lambda_is_that_of_the_least_loss(base: Path, tunes: dict[str, Path], tmp_path: Path) -> None:
    from compress.evaluation.bundles import task_losses

    texts = {}
    for name in "ab":
        texts[name] = tmp_path / f"{name}.txt"
        texts[name].write_text(f"{name} the quick brown fox jumps over the lazy dog. " * 20)
    out, work = tmp_path / "out", tmp_path / "work"
    report = compress.bundle(base, {n: tunes[n] for n in "ab"}, out, mode="mask", validation=texts, seqlen=32, validation_windows=2,
                             work_dir=work)  # fmt: skip
    losses = {}
    for lam in {0.2, 1.0, *report.lambdas.values()}:
        one = tmp_path / f"lam{lam}"
        compress.bundle(base, {n: tunes[n] for n in "ab"}, one, mode="mask", lam=lam)
        losses[lam] = task_losses(one, texts, base, 2, 32, "cpu")
    for name in "ab":
        best = report.lambdas[name]
        assert best == min(losses, key=lambda lam: losses[lam][name])
        table = json.loads((out / "tasks" / name / "task.json").read_text())
        assert table["lambda"] == best
        same = load_file(tmp_path / f"lam{best}" / "tasks" / name / "model.safetensors")
        assert all(torch.equal(t, same[n]) for n, t in load_file(out / "tasks" / name / "model.safetensors").items())
    assert manifest.read(out)["validation"].keys() == {"a", "b"}


# -- real fine-tunes in miniature ------------------------------------------------------------------------------------------


def test_a_bundle_of_trained_models_keeps_what_they_learned(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    words = {
        "sea": "The old ship sailed over the deep cold sea and never came home. ",
        "code": "def add(a, b): return a + b # sum of two ",
    }
    losses: dict[str, dict[str, float]] = {}

    def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model(ids, labels=ids).loss  # type: ignore[no-any-return]

    for name, text in words.items():
        ids = torch.tensor(tokenizer(text * 12, add_special_tokens=False)["input_ids"])[:128].view(2, 64)
        model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        with torch.no_grad():
            losses[name] = {"base": float(loss(model, ids))}
        for _ in range(5):
            loss(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses[name]["tune"] = float(loss(model, ids))
        model.half().save_pretrained(tmp_path / name)
        shutil.copyfile(EXAMPLE / "tokenizer.json", tmp_path / name / "tokenizer.json")
        words[name] = ids  # type: ignore[assignment]
    report = compress.bundle(EXAMPLE, [tmp_path / n for n in words], tmp_path / "out", mode="refined", shared="int4")
    assert report.bytes < 0.25 * report.bytes_separate
    bundle = exact(tmp_path / "out", task="sea", base=EXAMPLE)
    for name, ids in words.items():
        with torch.no_grad():
            got = float(loss(bundle.set_task(name), ids))  # type: ignore[arg-type]
        gain = losses[name]["base"] - losses[name]["tune"]
        assert gain > 1
        assert (losses[name]["base"] - got) / gain > 0.85, (name, losses[name], got)

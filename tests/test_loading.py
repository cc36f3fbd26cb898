"""Loading: tiny artifacts written by hand, against the same model with dense weights and stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import compress
from compress.checkpoint import manifest
from compress.errors import CompressError
from compress.formats import awq, int_grouped
from compress.loading import register
from compress.modules import CompressedLinear, linear_shape

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
KV = {"num_key_value_heads": 2, "max_position_embeddings": 64}
TOKENS = torch.arange(12).view(2, 6)
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are compared bit for bit: the C++ kernels add in another order."""
    monkeypatch.setenv("COMPRESS_BACKEND", "tiled")


def llama(**more: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **KV, "tie_word_embeddings": False, **more})


def settings(bits: int, size: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {**group, **more}}, "dequantize": not symmetric,
    }  # fmt: skip


def awq_settings(size: int) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}


def write(
    folder: Path, config: Any, *, bits: int = 4, size: int = 32, symmetric: bool = True,
    dtype: torch.dtype = torch.float32, kind: Any = int_grouped, quantization: dict[str, Any] | None = None,
) -> torch.nn.Module:  # fmt: skip
    """Write an artifact with random codes in every linear but the head; returns the dense model in fp32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    tensors = {name: t.to(dtype) for name, t in model.state_dict().items()}
    for tied in model.all_tied_weights_keys:
        del tensors[tied]
    for name, module in list(model.named_modules()):
        shape = linear_shape(module)
        if shape is None or name == "lm_head":
            continue
        G = 1 if size == -1 else shape[1] // size
        q, zero = (torch.randint(0, 1 << bits, (shape[0], n), dtype=torch.uint8) for n in (shape[1], G))
        scale = (torch.rand(shape[0], G) * 0.1 / (1 << bits)).to(dtype)
        packed = kind.pack(q, scale, None if symmetric else zero, bits=bits, group_size=size)
        W = kind.dequantize(packed)
        module.weight.data = W if isinstance(module, torch.nn.Linear) else W.T.contiguous()
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": t for suffix, t in packed.tensors.items()}
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    facts = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    facts["quantization_config"] = quantization or settings(bits, size, symmetric)
    (folder / "config.json").write_text(json.dumps(facts))
    return model


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads((folder / "config.json").read_text())
    change(facts["quantization_config"])
    (folder / "config.json").write_text(json.dumps(facts))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def compressed(model: Any) -> dict[str, CompressedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}


@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_logits_equal_the_dense_model_and_stock_transformers(tmp_path: Path, bits: int, symmetric: bool, size: int) -> None:
    dense = write(tmp_path / "a", llama(), bits=bits, size=size, symmetric=symmetric)
    model = compress.load(tmp_path / "a", device="cpu")
    assert not model.training
    assert len(compressed(model)) == 14
    assert {m.path for m in compressed(model).values()} == {"tiled"}
    assert torch.equal(logits(model), logits(dense))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert not compressed(stock)
    assert torch.equal(logits(model), logits(stock))


@pytest.mark.parametrize(
    "config",
    [
        llama(tie_word_embeddings=True),
        Qwen2Config(**SMALL, **KV, tie_word_embeddings=False),
        Qwen3Config(**SMALL, **KV, head_dim=16),
        MistralConfig(**SMALL, **KV),
        Gemma2Config(**SMALL, **KV, head_dim=16, sliding_window=4),
        Gemma3TextConfig(**SMALL, **KV, head_dim=16, sliding_window=4),
        Phi3Config(**SMALL, **KV, pad_token_id=0),
        OPTConfig(hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
                  word_embed_proj_dim=64, max_position_embeddings=64),
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=64),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_every_kind_of_family_loads_with_its_biases_and_ties(tmp_path: Path, config: Any) -> None:
    guard = {"format": "compress-int_grouped"} if config.model_type == "gpt2" else {}
    dense = write(tmp_path / "a", config, symmetric=False, quantization=settings(4, 32, False, **guard))
    model = compress.load(tmp_path / "a", device="cpu")
    assert compressed(model)
    assert torch.equal(logits(model), logits(dense))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    if config.tie_word_embeddings:
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_head_may_be_compressed_though_the_config_ties_it(tmp_path: Path) -> None:
    dense = write(tmp_path / "a", llama(tie_word_embeddings=True))
    packed = int_grouped.pack(torch.full((64, 64), 9, dtype=torch.uint8), torch.ones(64, 2), None, bits=4, group_size=32)
    edit_tensors(tmp_path / "a", lambda t: t.update({f"lm_head.{s}": v for s, v in packed.tensors.items()}))
    dense.lm_head.weight = torch.nn.Parameter(int_grouped.dequantize(packed))
    model = compress.load(tmp_path / "a", device="cpu")
    assert "lm_head" in compressed(model)
    assert torch.equal(logits(model), logits(dense))


def test_a_tied_head_that_is_stored_and_differs_stays_untied(tmp_path: Path) -> None:
    dense = write(tmp_path / "a", llama(tie_word_embeddings=True))
    edit_tensors(tmp_path / "a", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    assert torch.equal(logits(compress.load(tmp_path / "a", device="cpu")), logits(dense) * 2)


def test_tensors_that_the_manifest_calls_extra_are_left_alone(tmp_path: Path) -> None:
    dense = write(tmp_path / "a", llama())
    edit_tensors(tmp_path / "a", lambda t: t.update(x=torch.ones(1)))
    write_facts(tmp_path / "a", {}, extra=["x"])
    assert torch.equal(logits(compress.load(tmp_path / "a", device="cpu")), logits(dense))


def test_dense_weight_and_state_dict_are_the_artifacts(tmp_path: Path) -> None:
    dense = write(tmp_path / "a", llama(), bits=3, symmetric=False)
    model = compress.load(tmp_path / "a", device="cpu")
    assert torch.equal(compressed(model)[DOWN].dense_weight(), dense.get_submodule(DOWN).weight)
    on_disk = load_file(tmp_path / "a" / "model.safetensors")
    assert on_disk.keys() == model.state_dict().keys()
    assert all(torch.equal(on_disk[name], t) for name, t in model.state_dict().items())


def test_a_saved_model_loads_again(tmp_path: Path) -> None:
    dense = write(tmp_path / "a", llama(tie_word_embeddings=True))
    compress.load(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    assert torch.equal(logits(compress.load(tmp_path / "b", device="cpu")), logits(dense))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["cpu", "int4pack"])
def test_16_bit_checkpoints_run_fast_kernels_in_bf16_on_a_cpu(
    tmp_path: Path, stored: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", path)
    dense = write(tmp_path / "a", llama(), symmetric=False, dtype=stored)
    model = compress.load(tmp_path / "a", device="cpu")
    assert model.dtype == torch.bfloat16
    assert {m.weight_scale.dtype for m in compressed(model).values()} == {stored}
    assert {m.path for m in compressed(model).values()} == {path}
    linear, x = compressed(model)[DOWN], torch.randn(4, 96).bfloat16()
    want = torch.nn.functional.linear(x.float(), dense.get_submodule(DOWN).weight.detach())
    assert float((linear(x).float() - want).norm() / want.norm()) < 1e-2
    assert float((logits(model).float() - logits(dense)).norm() / logits(dense).norm()) < 3e-2  # bf16 throughout


def test_exact_keeps_to_the_reference(tmp_path: Path) -> None:
    dense = write(tmp_path / "a", llama(), dtype=torch.float16)
    model = compress.load(tmp_path / "a", device="cpu", exact=True)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(dense))
    half = compress.load(tmp_path / "a", device="cpu", exact=True, dtype="bfloat16")
    assert {m.path for m in compressed(half).values()} == {"tiled"}
    for parameter in dense.parameters():  # not dense.bfloat16(): that rounds rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(half), logits(dense))


def test_moving_to_another_dtype_keeps_the_weights_values(tmp_path: Path) -> None:
    dense = write(tmp_path / "a", llama(), dtype=torch.float16)
    model = compress.load(tmp_path / "a", device="cpu").float()
    assert {m.path for m in compressed(model).values()} == {"tiled"}
    assert torch.equal(compressed(model)[DOWN].dense_weight(), dense.get_submodule(DOWN).weight)


@pytest.mark.parametrize("size", [32, -1])
def test_an_awq_folder_loads_as_int_grouped(tmp_path: Path, size: int) -> None:
    quantization = awq_settings(size)
    config = Qwen2Config(**SMALL, **KV)
    dense = write(tmp_path / "a", config, size=size, dtype=torch.float16, kind=awq, quantization=quantization)
    model = compress.load(tmp_path / "a", device="cpu", exact=True)
    assert {m.kind for m in compressed(model).values()} == {"int_grouped"}
    assert torch.equal(logits(model), logits(dense))


def test_groups_are_found_by_name_then_pattern_then_class(tmp_path: Path) -> None:
    dense = write(tmp_path / "a", llama())
    wrong, right = (settings(bits, 32, True)["config_groups"]["group_0"] for bits in (8, 4))
    names = {"targets": ["re:.*self_attn.*", "re:.*gate_proj", "re:.*up_proj", "model.layers.0.mlp.down_proj", DOWN]}
    groups = {"group_0": wrong, "group_1": {**right, **names}}
    edit_config(tmp_path / "a", lambda q: q.update(config_groups=groups))
    assert torch.equal(logits(compress.load(tmp_path / "a", device="cpu")), logits(dense))


def test_a_trunk_only_checkpoint_and_its_derived_buffers_load(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=64)
    dense = write(tmp_path / "a", config)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()} | {"h.0.attn.bias": torch.ones(1)}
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    assert torch.equal(logits(compress.load(tmp_path / "a", device="cpu")), logits(dense))


def test_a_dense_folder_gives_the_ordinary_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(llama()).eval()
    model.save_pretrained(tmp_path / "a")
    loaded = compress.load(tmp_path / "a", device="cpu")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    edit_tensors(tmp_path / "a", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CompressError, match=r"model\.norm\.weight is missing"):
        compress.load(tmp_path / "a", device="cpu")


def test_generation_config_travels(tmp_path: Path) -> None:
    write(tmp_path / "a", llama())
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    model = compress.load(tmp_path / "a", device="cpu")
    assert model.generation_config.temperature == 0.25
    assert model.generate(TOKENS, max_new_tokens=2).shape == (2, 8)


def test_a_device_map_and_offloaded_weights_give_the_same_logits(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    dense = write(tmp_path / "a", llama(), symmetric=False)
    mapped = compress.load(tmp_path / "a", device_map="auto" if not torch.cuda.is_available() else "cpu")
    assert torch.equal(logits(mapped), logits(dense))
    offloaded = compress.load(tmp_path / "a", device="cpu")
    cpu_offload(offloaded, torch.device("cpu"), offload_buffers=True)
    for module in compressed(offloaded).values():
        module.prepare()
    assert {m.path for m in compressed(offloaded).values()} == {"unprepared"}
    assert torch.equal(logits(offloaded), logits(dense))


STOCK = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"


def test_stock_transformers_refuses_a_guarded_artifact(tmp_path: Path) -> None:
    quantization = settings(4, 32, True, format="compress-int_grouped")
    write(tmp_path / "a", llama(), quantization=quantization)
    run = subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "a")], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ValidationError" in run.stderr
    assert "compress-int_grouped" in run.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_registered_transformers_loads_a_guarded_artifact(tmp_path: Path, family: str) -> None:
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    quantization = settings(4, 32, False, format="compress-int_grouped")
    dense = write(tmp_path / "a", gpt2 if family == "gpt2" else llama(), symmetric=False, quantization=quantization)
    register()
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert compressed(model)
    assert torch.equal(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(compress.load(tmp_path / "b", device="cpu")), logits(dense))


def test_registered_transformers_refuses_a_missing_tensor_instead_of_a_random_one(tmp_path: Path) -> None:
    write(tmp_path / "a", llama(), quantization=settings(4, 32, True, format="compress-int_grouped"))
    edit_tensors(tmp_path / "a", lambda t: t.pop("model.norm.weight"))
    register()
    with pytest.raises(CompressError, match=r"model\.norm\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def escape(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_facts(folder: Path, linears: dict[str, Any], **more: Any) -> None:
    """A manifest with these linears; of format dense, which may have none."""
    facts = {"schema": manifest.SCHEMA, "format": "dense", "source": {}, "files": {}, "search": [], "config": {}}
    (folder / "manifest.json").write_text(json.dumps({**facts, "linears": linears, **more}))


def from_the_future(folder: Path) -> None:
    entry = {"kind": "int_grouped", "version": 99, "params": {}, "shape": [64, 96], "bits": 4.0, "error": 0.1}
    write_facts(folder, {DOWN: entry})


def group(**change: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda q: q["config_groups"]["group_0"].update(change))


def tensor(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    name = f"{DOWN}.{suffix}"
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: change(t[name]).contiguous()}))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda f: edit_tensors(f, lambda t: t.pop(f"{DOWN}.weight_scale")), rf"{DOWN}.weight_scale is missing"),
        (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), r"model.norm.weight is missing"),
        (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "tensor x is unexpected"),
        (lambda f: edit_tensors(f, lambda t: t.update({f"{DOWN}.weight_x": torch.ones(1)})), "weight_x is unexpected"),
        (tensor("weight_packed", lambda t: t[:, 1:]), r"weight_packed is I32 \[64, 11\], wanted I32 \[64, 12\]"),
        (tensor("weight_packed", lambda t: t.long()), r"weight_packed is I64 \[64, 12\], wanted I32"),
        (tensor("weight_scale", lambda t: t.int()), r"weight_scale is I32"),
        (tensor("weight_shape", lambda t: t + 1), r"weight_shape holds \[65, 97\]"),
        (lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.ones(3)})), r"lm_head.weight is \[3\]"),
        (truncate, "truncated|length"),
        (escape, "not a file name in this folder"),
        (from_the_future, "version 99"),
        (group(format="compress-int_grouped_v9"), "unknown kind"),
        (group(format="float-quantized"), "float-quantized"),
        (group(targets=["re:nothing"]), "no group of quantization_config covers it"),
        (group(input_activations={"num_bits": 8}), "quantized activations"),
        (group(weights={"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}), "float weights"),
        (group(weights={"num_bits": 4, "strategy": "group", "group_size": 7}), "no multiple of group_size 7"),
        (lambda f: edit_config(f, lambda q: q.update(quant_method="gptq")), "quant_method 'gptq'"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "no-such-model"}'), "no-such-model"),
    ],
)  # fmt: skip
def test_a_damaged_artifact_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], Any], why: str) -> None:
    write(tmp_path / "a", llama())
    damage(tmp_path / "a")
    with pytest.raises(CompressError, match=why) as caught:
        compress.load(tmp_path / "a", device="cpu")
    assert caught.value.hint


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", llama())
    with pytest.raises(CompressError, match="no task"):
        compress.load(tmp_path / "a", task="arithmetic")
    with pytest.raises(CompressError, match="dtype"):
        compress.load(tmp_path / "a", dtype="int32")
    with pytest.raises(CompressError, match="no such folder"):
        compress.load(tmp_path / "b")


def test_a_linear_can_be_built_on_meta() -> None:
    params = {"bits": 3, "group_size": 32, "symmetric": False}
    module = CompressedLinear("int_grouped", params, (40, 64), stored="F16", dtype=torch.float32, bias=True)
    assert all(t.is_meta for t in module.state_dict().values())
    assert "64 -> 40, int_grouped(bits=3" in repr(module)

"""LOST's layers: the identities of their start and forward pass, their bytes, and artifacts of models trained with them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_kernels import lost as kernel
from compress_kernels.lost import reference
from conftest import STOCK_LOGITS, Outcome, python, tree
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress import training
from compress.checkpoint import dtypes
from compress.errors import CompressError
from compress.formats import lost
from compress.methods import _lost
from compress.types import Packed

F16, BF16 = torch.float16, torch.bfloat16
O, I, R, S = 20, 28, 6, 4
IDS = torch.tensor([[5, 17, 99, 64, 33, 21, 8]])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(activation: str = "silu", E: torch.dtype = torch.float64) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and params of a layer from a random weight (O, I)."""
    f = _lost.initialise(random(O, I), R, S)
    tensors = {"A": f.A.to(E), "B": f.B.to(E), "columns": f.columns, "W_s": f.W_s.to(E)}
    return tensors, {"rank": R, "kept": S, "gamma": 0.7, "activation": activation}


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 28), (28, 20), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_factors_are_balanced_and_the_complement_is_what_they_leave(shape: tuple[int, int], rank: int) -> None:
    W = random(*shape)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    f = _lost.initialise(W, rank, 3)
    assert torch.allclose(f.B.T @ f.B, torch.diag(s[:rank]), atol=1e-12)
    assert torch.allclose(f.A @ f.A.T, torch.diag(s[:rank]), atol=1e-12)
    W_comp = _lost.complement(U, s, Vh, rank)
    assert torch.allclose(W_comp, W - f.B @ f.A, atol=1e-12)
    c = _lost.scores(W_comp)
    assert float(c.square().sum()) == pytest.approx(float(s[rank:].square().sum()), abs=1e-12)


def test_a_band_takes_the_triplets_after_the_rank_or_the_last_ones() -> None:
    U, s, Vh = torch.linalg.svd(random(O, I), full_matrices=False)
    for last, part in ((False, slice(R, R + 5)), (True, slice(len(s) - 5, None))):
        band = _lost.complement(U, s, Vh, R, 5, last)
        assert torch.allclose(band, U[:, part] @ torch.diag(s[part]) @ Vh[part], atol=1e-12)
    assert torch.equal(_lost.complement(U, s, Vh, R, 999), _lost.complement(U, s, Vh, R))
    assert _lost.complement(U, s, Vh, len(s)).count_nonzero() == 0


def test_the_columns_are_those_of_the_largest_residual_and_carry_the_whole_weight() -> None:
    W = random(O, R) @ random(R, I, seed=1)
    W += 0.01 * random(O, I, seed=2)
    special = torch.tensor([3, 11, 12, 27])
    W[:, special] += random(O, 4, seed=3)  # what six directions cannot hold
    f = _lost.initialise(W, R, 4)
    assert f.columns.tolist() == special.tolist()
    assert torch.equal(f.W_s, W[:, special])
    order = torch.randperm(I, generator=torch.Generator().manual_seed(0))
    g = _lost.initialise(W[:, order], R, 4)
    assert sorted(order[g.columns].tolist()) == special.tolist()
    assert torch.allclose((g.B @ g.A), (f.B @ f.A)[:, order], atol=1e-12)


def test_counts_are_rounded_down_but_one_column_is_kept_and_equal_scores_go_in_order() -> None:
    assert [_lost.kept(n, d) for n, d in ((128, 0.05), (10, 0.05), (100, 0.29), (64, 0.0), (7, 1.0))] == [6, 1, 29, 0, 7]
    assert _lost.choose(torch.tensor([1.0, 2, 2, 1, 2, 0]), 4).tolist() == [0, 1, 2, 4]
    assert _lost.initialise(random(O, I), R, 0).W_s.shape == (O, 0)
    c = _lost.scores(random(O, I), norm=1)
    assert torch.allclose(c, random(O, I).abs().sum(0))


def test_without_the_activation_the_start_is_a_mixture_of_the_best_low_rank_weight_and_columns() -> None:
    W = random(O, I)
    tensors, params = layer(activation="identity")
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    mixture = 0.7 * (U[:, :R] * s[:R]) @ Vh[:R]
    mixture[:, tensors["columns"]] += 0.3 * W[:, tensors["columns"]]
    assert torch.allclose(reference.weight(tensors, params).double(), mixture, atol=1e-6)  # multiplied in fp32


def test_cola_s_factors_have_their_scale() -> None:
    A, B = _lost.cola((300, 200), 64, torch.Generator().manual_seed(0))
    assert (A.shape, B.shape) == ((64, 200), (300, 64))
    for factor in (A, B):
        assert float(factor.std()) == pytest.approx(64**-0.25 * 500**-0.25, rel=0.03)  # of 12,800 draws


# -- the forward pass --------------------------------------------------------------------------------------------------


def test_gamma_one_is_the_low_rank_path_and_gamma_zero_the_sparse_one() -> None:
    x = random(3, I, seed=9)
    tensors, params = layer()
    low = torch.nn.functional.silu(x @ tensors["A"].T) @ tensors["B"].T
    sparse = x[:, tensors["columns"]] @ tensors["W_s"].T
    assert torch.allclose(reference.linear(x, tensors, {**params, "gamma": 1.0}), low, rtol=1e-12)
    assert torch.allclose(reference.linear(x, tensors, {**params, "gamma": 0.0}), sparse, rtol=1e-12)
    assert torch.allclose(reference.linear(x, tensors, params), 0.7 * low + 0.3 * sparse, rtol=1e-12)


def test_without_the_activation_it_is_one_fused_product_and_one_dense_weight() -> None:
    x, bias = random(5, I, seed=9), random(O, seed=8)
    tensors, params = layer(activation="identity")
    fused = torch.cat([0.7 * tensors["B"], 0.3 * tensors["W_s"]], 1)
    z = torch.cat([x @ tensors["A"].T, x[:, tensors["columns"]]], 1)
    y = reference.linear(x, tensors, params, bias)
    assert torch.allclose(y, z @ fused.T + bias, rtol=1e-6)
    unit = reference.linear(torch.eye(I, dtype=torch.float64), tensors, params).T
    assert torch.allclose(unit, reference.weight(tensors, params).double(), atol=1e-6)


def test_no_input_gives_the_bias_and_inputs_of_any_number_of_dimensions_the_same_rows() -> None:
    x, bias = random(2, 3, 4, I, seed=9), random(O, seed=8)
    tensors, params = layer()
    assert torch.equal(reference.linear(torch.zeros(I, dtype=torch.float64), tensors, params, bias), bias)
    y = reference.linear(x, tensors, params, bias)
    assert y.shape == (2, 3, 4, O)
    assert torch.allclose(reference.linear(x.reshape(24, I), tensors, params, bias), y.reshape(24, O), rtol=1e-12)
    assert torch.allclose(reference.linear(x[1, 2, 3], tensors, params, bias), y[1, 2, 3], rtol=1e-12)
    assert torch.allclose(reference.linear(x[:, 0], tensors, params, bias), y[:, 0], rtol=1e-12)
    alone = {**tensors, "columns": tensors["columns"][:0], "W_s": tensors["W_s"][:, :0]}
    low = reference.linear(x, alone, {**params, "kept": 0, "gamma": 1.0}, bias)
    assert torch.allclose(low, reference.linear(x, tensors, {**params, "gamma": 1.0}, bias), rtol=1e-12)


def test_gradients_are_those_of_the_formula() -> None:
    tensors, params = layer()
    free = [tensors[name].clone().requires_grad_() for name in ("A", "B", "W_s")]
    x, bias = random(3, I, seed=9).requires_grad_(), random(O, seed=8).requires_grad_()

    def forward(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, W_s: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return reference.linear(x, {"A": A, "B": B, "W_s": W_s, "columns": tensors["columns"]}, params, bias)

    assert torch.autograd.gradcheck(forward, (x, *free, bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (F16, 4e-3), (BF16, 3e-2)])  # some roundings of each
@pytest.mark.parametrize("rows", [1, 17])
def test_the_kernel_agrees_with_the_reference_in_double(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    tensors, params = layer(E=F16)
    stored = {**tensors, "columns": tensors["columns"].to(torch.uint16)}
    x, bias = random(rows, 2 * I, seed=9, dtype=dtype)[:, ::2], random(O, seed=8, dtype=dtype)
    y = kernel.linear(x, kernel.prepare(stored, params, (O, I), dtype), bias)
    want = reference.linear(x.double(), {**tensors, **{n: tensors[n].double() for n in ("A", "B", "W_s")}}, params, bias.double())
    assert y.dtype == dtype
    assert float((y.double() - want).norm() / want.norm()) < tolerance


# -- the bytes ---------------------------------------------------------------------------------------------------------


def packed(activation: str = "silu") -> Packed:
    t, params = layer(activation, F16)
    return lost.pack(t["A"], t["B"], t["columns"], t["W_s"], gamma=params["gamma"], activation=activation)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 9), st.integers(0, 12), st.sampled_from([F16, BF16]))
def test_a_layer_unpacks_to_itself(outputs: int, inputs: int, rank: int, count: int, E: torch.dtype) -> None:
    rank, count = min(rank, outputs, inputs), min(count, inputs)
    f = _lost.initialise(random(outputs, inputs, dtype=torch.float32), rank, count)
    A, B, W_s = f.A.to(E), f.B.to(E), f.W_s.to(E)
    p = lost.pack(A, B, f.columns, W_s, gamma=0.25)
    want = lost.spec(p.params, p.shape, dtypes.NAME[E])
    assert {n: (dtypes.NAME[t.dtype], tuple(t.shape)) for n, t in p.tensors.items()} == want
    for got, was in zip(lost.unpack(p), (A, B, f.columns, W_s), strict=True):
        assert torch.equal(got, was)
    assert lost.problems(p) == []
    bits = 16 * (rank * (outputs + inputs) + count * outputs) + 16 * count
    assert lost.bits_per_weight(p) == pytest.approx(bits / (outputs * inputs))


def test_columns_take_32_bits_beyond_65536_inputs_and_factors_of_float32_are_float16() -> None:
    params = {"rank": 2, "kept": 3, "gamma": 0.7, "activation": "silu"}
    assert lost.spec(params, (4, 1 << 16), "BF16")["columns"] == ("U16", (3,))
    assert lost.spec(params, (4, (1 << 16) + 1), "BF16")["columns"] == ("I32", (3,))
    assert {n: dtype for n, (dtype, _) in lost.spec(params, (4, 8), "F32").items()} == {
        "B": "F16", "A": "F16", "columns": "U16", "W_s": "F16",
    }  # fmt: skip


def test_bytes_of_a_fixed_input_are_frozen() -> None:
    k = torch.arange(1000)
    values = ((k * 37 % 101 - 50) / 64).to(F16)
    p = lost.pack(
        values[:84].view(3, 28), values[100:160].view(20, 3), torch.tensor([0, 5, 19, 27]), values[200:280].view(20, 4), gamma=0.7
    )
    assert (p.kind, p.version, p.params) == ("lost", 1, {"rank": 3, "kept": 4, "gamma": 0.7, "activation": "silu"})
    assert {n: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for n, t in p.tensors.items()} == GOLDEN


GOLDEN = {
    "B": "64111fcd743e77a6",
    "A": "becb24e123bf0fd7",
    "columns": "6d939e3388c9c18b",
    "W_s": "6ffe82d49b314481",
}


def test_params_that_fit_no_layer_are_refused() -> None:
    good = {"rank": 2, "kept": 3, "gamma": 0.7, "activation": "silu"}
    for bad, why in (
        ({"rank": 0}, "rank 0 of a linear of 4 x 8: 1 to 4"), ({"rank": 5}, "rank 5"), ({"kept": 9}, "9 kept columns of 8 inputs"),
        ({"gamma": 1.5}, "gamma 1.5"), ({"activation": "relu"}, "the activation is 'relu', not silu or identity"),
    ):  # fmt: skip
        with pytest.raises(CompressError, match=why):
            lost.spec({**good, **bad}, (4, 8), "F16")


@pytest.mark.parametrize(
    ("tensor", "value", "why"),
    [
        ("columns", [5, 0, 7, 9], "columns are not ascending ones below 28"),
        ("columns", [5, 5, 7, 9], "columns are not ascending"),
        ("columns", [0, 1, 2, 28], "columns are not ascending ones below 28"),
        ("columns", [0, 1, 2], r"columns is \[3\], wanted \[4\]"),
        ("A", None, "A holds NaN or Inf"),
        ("W_s", None, "W_s holds NaN or Inf"),
    ],
)
def test_damage_is_named(tensor: str, value: list[int] | None, why: str) -> None:
    p = packed()
    broken = p.tensors[tensor].clone() if value is None else torch.tensor(value).to(torch.uint16)
    if value is None:
        broken[1, 1] = float("nan")
    tensors = {**p.tensors, tensor: broken}
    assert re.search(why, lost.problems(Packed(p.kind, p.version, p.params, tensors, p.shape))[0])
    with pytest.raises(ValueError, match=why):
        kernel.prepare(tensors, p.params, p.shape, torch.float32)


def test_a_layer_with_silu_has_no_weight_and_one_without_has_its_mixture() -> None:
    with pytest.raises(CompressError, match="no dense weight: silu stands between its factors"):
        lost.dequantize(packed())
    p = packed(activation="identity")
    assert torch.equal(lost.dequantize(p), reference.weight(p.tensors, p.params))


# -- models ------------------------------------------------------------------------------------------------------------


def fresh(pico: Callable[..., Path], family: str = "llama") -> Any:
    """A pico model in float32, and its tokenizer's folder."""
    return compress.load(pico(family), dtype=torch.float32)


def rounded(model: Any) -> Any:
    """The model with its factors rounded to what is stored."""
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in ("A", "B", "W_s"):
            p.data = p.data.to(F16).float()
    return model


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def artifact(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An artifact of a llama with LOST layers, and the logits of the model in memory."""
    out = tmp_path_factory.mktemp("lost") / "out"
    model = fresh(pico)
    training.convert(model, 12, 0.1)
    rounded(model)
    training.save(model, out, tokenizer=tokenizer(pico("llama")), config={"rank": 12}, seed=0)
    with torch.no_grad():
        return out, model(IDS).logits


def test_training_moves_factors_values_and_biases_and_nothing_else(pico: Callable[..., Path]) -> None:
    model = fresh(pico)
    layers = training.convert(model, 8)
    assert len(layers) == 14
    assert all(isinstance(model.get_submodule(name), training.LostLinear) for name in layers)
    one = layers["model.layers.1.mlp.down_proj"]
    assert {n for n, _ in one.named_parameters()} == {"A", "B", "W_s", "bias"}
    assert [n for n, _ in one.named_buffers()] == ["columns"]
    before = {name: {n: t.clone() for n, t in m.state_dict().items()} for name, m in layers.items()}
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for name, m in layers.items():
        assert torch.equal(m.columns, before[name]["columns"])
        assert m.params["gamma"] == 0.7
        for part in ("A", "B", "W_s", "bias"):
            if not (part == "bias" and name.endswith("k_proj")):  # softmax does not see a bias of the keys
                assert not torch.equal(m.state_dict()[part], before[name][part]), f"{name}.{part}"


def test_a_stranger_s_trainer_trains_them(pico: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = fresh(pico)
    layers = training.convert(model.requires_grad_(True), 8)
    columns = {name: m.columns.clone() for name, m in layers.items()}
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    args = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], save_strategy="no",
        logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(torch.equal(m.columns, columns[name]) for name, m in layers.items())


def test_convert_keeps_what_it_is_told_and_refuses_what_it_cannot_do(pico: Callable[..., Path]) -> None:
    model = fresh(pico)
    ranks = {name: 3 + i for i, name in enumerate(training.linears(model))}
    layers = training.convert(model, ranks, 0.0, 1.0, start="cola", dense=["model.layers.0.mlp.up_proj"])
    assert "model.layers.0.mlp.up_proj" not in layers
    assert all(m.params == {"rank": ranks[n], "kept": 0, "gamma": 1.0, "activation": "silu"} for n, m in layers.items())
    again = fresh(pico)
    assert torch.equal(next(iter(training.convert(again, ranks, 0.0, 1.0, start="cola").values())).A, next(iter(layers.values())).A)
    for args, why in (
        ((0,), "rank 0 of a linear"), ((4, 1.5), "delta 1.5"), ((4, 0.1, 2.0), "gamma 2.0"), (({"a": 1},), "a is no linear"),
    ):  # fmt: skip
        with pytest.raises(CompressError, match=why):
            training.convert(fresh(pico), *args)
    for options, why in (({"start": "random"}, "start 'random'"), ({"band": 0}, "band 0"), ({"dense": ["b"]}, "b is no linear")):
        with pytest.raises(CompressError, match=why):
            training.convert(fresh(pico), 4, **options)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "gpt2"])
def test_every_family_is_served_as_it_was_trained(family: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    model = fresh(pico, family)
    training.convert(model, 10, 0.1, band=7)
    training.save(rounded(model), tmp_path / "out", max_shard_size=40_000)
    served = compress.load(tmp_path / "out", exact=True)
    with torch.no_grad():
        assert torch.equal(served(IDS).logits, model(IDS).logits)
    assert compress.load(pico(family), dtype=torch.float32)(IDS).logits.sub(model(IDS).logits).abs().max() > 1e-3  # another model
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_the_commands_read_it(artifact: tuple[Path, torch.Tensor], cli: Callable[..., Outcome], tmp_path: Path) -> None:
    out, logits = shutil.copytree(artifact[0], tmp_path / "out"), artifact[1]  # eval writes its report into it
    assert cli("verify", out).code == 0
    said = cli("inspect", out).out
    assert "lost-layers, format lost" in said
    assert "it refuses compress-lost on purpose" in said
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    evaluated = cli("eval", out, "--text", text, "--seqlen", 32, "--json", "--fast")
    assert evaluated.code == 0, evaluated.err
    assert cli("generate", out, "--prompt", "The", "--max-new-tokens", 4).code == 0
    from transformers import AutoModelForCausalLM

    compress.register()
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, logits, atol=1e-6)
        assert torch.equal(compress.load(out, exact=True)(IDS).logits, logits)


def test_stock_transformers_refuses_it(artifact: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    done = python(STOCK_LOGITS, artifact[0], tmp_path / "logits.pt", json.dumps(IDS.tolist()))
    assert done.returncode != 0
    assert "compress-lost" in done.stderr


def test_it_is_never_taken_for_a_dense_checkpoint(
    artifact: tuple[Path, torch.Tensor], cli: Callable[..., Outcome], tmp_path: Path, pico: Callable[..., Path]
) -> None:
    for command in (("quantize", "-m", "rtn"), ("prune", "-m", "magnitude")):
        done = cli(command[0], artifact[0], *command[1:], "-o", tmp_path / "out")
        assert done.code == 1
        assert "stands for no dense weight: silu stands between its factors" in done.err
    assert "there is no source" in cli("verify", artifact[0], "--deep", "--source", pico("llama")).err


def test_saving_again_gives_the_same_bytes_also_after_a_crash(
    artifact: tuple[Path, torch.Tensor], pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(pico)
    training.convert(model, 12, 0.1)
    options = {"tokenizer": tokenizer(pico("llama")), "config": {"rank": 12}, "seed": 0}
    with monkeypatch.context() as patch:
        patch.setattr(training.artifact, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            training.save(rounded(model), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    training.save(model, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == tree(artifact[0])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CompressError, match="out: exists"):
        training.save(model, tmp_path / "out", **options)


def test_what_cannot_be_stored_is_named(pico: Callable[..., Path], tmp_path: Path) -> None:
    model = fresh(pico)
    with pytest.raises(CompressError, match="the model has no LOST layer"):
        training.save(model, tmp_path / "out")
    layers = training.convert(model, 4)
    layers["model.layers.1.mlp.up_proj"].B.data[3, 2] = 1e6  # no float16
    with pytest.raises(CompressError, match=r"model\.layers\.1\.mlp\.up_proj: B holds NaN or Inf"):
        training.save(model, tmp_path / "out")
    training.save(model.to(BF16), tmp_path / "out")
    served = compress.load(tmp_path / "out")
    assert served.dtype == BF16
    assert float(served.model.layers[1].mlp.up_proj.B[3, 2]) == pytest.approx(1e6, rel=2**-8)
    assert not (tmp_path / "out.partial").exists()


def test_damage_on_the_disk_is_found(artifact: tuple[Path, torch.Tensor], tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    from safetensors.torch import load_file, save_file

    for name, data in tree(artifact[0]).items():
        (tmp_path / name).write_bytes(data)
    tensors = load_file(tmp_path / "model.safetensors")
    columns = tensors["model.layers.0.mlp.up_proj.columns"]
    tensors["model.layers.0.mlp.up_proj.columns"] = torch.tensor(columns.tolist()[::-1]).to(columns.dtype)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressError, match=r"model\.layers\.0\.mlp\.up_proj: .*columns are not ascending"):
        compress.load(tmp_path)
    assert "model.safetensors: " in cli("verify", tmp_path).err
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["quantization_config"]["config_groups"]["group_0"]["compress"]["rank"] = 11
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(CompressError, match=r"is F16 \[12, 128\], wanted F16 \[11, 128\]"):
        compress.load(tmp_path)

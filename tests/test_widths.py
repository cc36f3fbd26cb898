"""Mixed widths: by pattern, or the least measured loss under a budget."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, STOCK_LOGITS, VALID, Outcome, python
from test_load_matrix import IDS, own_logits, stock_logits

import compress
from compress.audit import verify, verify_deep
from compress.checkpoint import manifest
from compress.methods._quantizer import Grid, fake
from compress.methods._widths import WIDTHS, WidthErrors, choose
from compress.types import Block

DATA: dict[str, Any] = {"dataset": CALIBRATION, "nsamples": 4, "seqlen": 128}


def widths(folder: Path) -> dict[str, int]:
    return {n: e["params"]["bits"] for n, e in manifest.read(folder)["linears"].items()}


def stored_bits(folder: Path) -> float:
    linears = manifest.read(folder)["linears"].values()
    sizes = [e["shape"][0] * e["shape"][1] for e in linears]
    return sum(e["bits"] * s for e, s in zip(linears, sizes, strict=True)) / sum(sizes)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    items = 6
    sizes = [[n * b for b in WIDTHS] for n in (rng.choice((3, 64, 192, 1000)) for _ in range(items))]
    errors = [[rng.random() * 10 ** rng.uniform(-6, 3) * 4.0**-b for b in WIDTHS] for _ in range(items)]
    least, most = (sum(f(s) for s in sizes) for f in (min, max))
    budget = rng.randint(least, most)
    picked = choose(errors, sizes, budget)
    assert picked is not None
    assert sum(s[i] for s, i in zip(sizes, picked, strict=True)) <= budget

    def total(table: list[list[Any]], plan: tuple[int, ...] | list[int]) -> Any:
        return sum(row[i] for row, i in zip(table, plan, strict=True))

    plans = itertools.product(range(len(WIDTHS)), repeat=items)
    least_error = min(total(errors, p) for p in plans if total(sizes, p) <= budget)
    assert total(errors, picked) == pytest.approx(least_error, rel=1e-6, abs=1e-9)


def test_a_budget_that_nothing_meets_has_no_choice() -> None:
    assert choose([[1.0, 0.0]], [[10, 20]], 9) is None


def test_the_measured_error_is_the_weighted_output_error() -> None:
    g = torch.Generator().manual_seed(0)
    W, x, dy = torch.randn(8, 32, generator=g), torch.randn(20, 32, generator=g), torch.randn(20, 8, generator=g)
    grid = Grid(4, 16, False, torch.float32)
    reducer = WidthErrors(Block(0, {"fc": W}, {}, ()), grid)
    for part in (slice(0, 7), slice(7, 20)):
        reducer.add("fc", x[part], dy[part])
    found = reducer.result()["widths:fc"]
    for bits, value in zip(WIDTHS, found.tolist(), strict=True):
        D = fake(W, grid.at({"bits": bits})) - W
        assert value == pytest.approx(float(((x @ D.T) * dy).square().sum()), rel=2e-2)  # D is kept in bfloat16
    assert found.diff().max() < 0


def test_patterns_give_widths_and_the_last_match_wins(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    out = tmp_path / "out"
    rules = ["--layer-config", "re:.*down_proj=8", "--layer-config", "model.layers.2.mlp.down_proj=2"]
    done = cli("quantize", EXAMPLE, "-m", "rtn", "--bits", 3, "--group-size", 32, *rules, "-o", out)
    assert done.code == 0, done.err
    found = widths(out)
    assert {found[f"model.layers.{i}.mlp.down_proj"] for i in (0, 1, 3, 4, 5)} == {8}
    assert found["model.layers.2.mlp.down_proj"] == 2
    assert {b for n, b in found.items() if "down_proj" not in n} == {3}
    assert cli("verify", out, "--deep", "--source", EXAMPLE).code == 0
    assert "down_proj: 1 at 2 bits, 5 at 8 bits" in cli("inspect", out).out


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "rsq", "gwq"])
def test_every_method_keeps_to_a_budget(method: str, tmp_path: Path) -> None:
    group = {"group_size": 16} if method == "gwq" else {"group_size": 32}
    budget = 4.3 if method == "gwq" else 3.8
    quick = {"grid": 4, "keep": 2, "clip_steps": 2} if method == "awq" else {}
    options = {"symmetric": False, **group, **quick, **DATA}
    report = compress.quantize(EXAMPLE, method, tmp_path / "out", target_bpw=budget, **options)
    assert budget - 0.05 < stored_bits(tmp_path / "out") <= budget
    assert report.bits_per_weight == pytest.approx(stored_bits(tmp_path / "out"))
    assert len(set(widths(tmp_path / "out").values())) > 1
    assert verify(tmp_path / "out") == []
    assert verify_deep(tmp_path / "out", EXAMPLE) == []


def test_measured_widths_beat_the_first_blocks_at_the_same_size(tmp_path: Path) -> None:
    rules = ["re:.*layers[.][012][.].*=4"]
    compress.quantize(EXAMPLE, "rtn", tmp_path / "blocks", bits=3, group_size=32, layer_config=rules)
    budget = stored_bits(tmp_path / "blocks")
    compress.quantize(EXAMPLE, "rtn", tmp_path / "measured", group_size=32, target_bpw=budget, **DATA)
    assert budget - 0.05 < stored_bits(tmp_path / "measured") <= budget
    blocks, measured = (
        compress.evaluate(tmp_path / n, text=VALID, windows=24, batch_size=8)["perplexity"].value for n in ("blocks", "measured")
    )
    assert measured < 0.98 * blocks


def test_rules_are_kept_under_a_budget(tmp_path: Path) -> None:
    rules = ["re:.*layers.0.*=8"]
    compress.quantize(EXAMPLE, "rtn", tmp_path / "out", group_size=32, target_bpw=4.5, layer_config=rules, **DATA)
    found = widths(tmp_path / "out")
    assert {b for n, b in found.items() if "layers.0." in n} == {8}
    assert stored_bits(tmp_path / "out") <= 4.5


RULES = ["re:.*down_proj=8", "re:.*v_proj=2", "re:.*q_proj=3"]


def test_stock_transformers_gives_our_logits_for_symmetric_mixed_widths(tmp_path: Path) -> None:
    compress.quantize(EXAMPLE, "rtn", tmp_path / "out", group_size=32, symmetric=True, layer_config=RULES)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["quantization_config"]["config_groups"]) == 4
    assert torch.equal(stock_logits(tmp_path / "out", tmp_path), own_logits(tmp_path / "out"))


def test_asymmetric_mixed_widths_are_refused_by_stock_transformers_which_would_read_them_wrong(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress.quantize(EXAMPLE, "rtn", tmp_path / "out", group_size=32, layer_config=RULES)
    done = python(STOCK_LOGITS, tmp_path / "out", tmp_path / "logits.pt", json.dumps(IDS))
    assert done.returncode != 0
    assert "compress-int_grouped" in done.stderr
    compress.register()
    registered = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(registered(torch.tensor(IDS)).logits, own_logits(tmp_path / "out"), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--layer-config", "re:.*down_proj"], "PATTERN=BITS"), (["--layer-config", "re:.*down_proj=16"], "PATTERN=BITS"),
        (["--layer-config", "nothing=4"], "matches no linear"), (["--layer-config", "re:[=4"], "--layer-config"),
        (["--target-bpw", "1.5"], "least choice takes"), (["--target-bpw", "nan"], "--target-bpw"),
        (["--target-bpw", "4", "--format", "awq"], "awq"), (["--layer-config", "re:.*=8", "--format", "awq"], "4 bits"),
    ],
)  # fmt: skip
def test_wrong_options_are_usage_errors(options: list[str], why: str, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    done = cli("quantize", EXAMPLE, "-m", "rtn", "--group-size", 32, "--dataset", CALIBRATION, *options, "-o", tmp_path / "out")
    assert done.code == 2, done.err
    assert why in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "bits"), [({"target_bpw": 5.5}, set()), ({"layer_config": ["re:.*q_proj=8"]}, set()), ({"bits": 3}, {3})]
)
def test_linears_of_few_outputs_stay_dense_whatever_width_is_chosen(
    options: dict[str, Any], bits: set[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stock loader cannot read 4-bit zero-points of at most 8 outputs; what is compressed must not depend on the choice."""
    from conftest import FAMILIES, _save_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], "num_key_value_heads": 1, "head_dim": 8})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    _save_tokenizer(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    compress.quantize(tmp_path / "model", "rtn", tmp_path / "out", group_size=32, dataset=text, nsamples=2, seqlen=16, **options)
    found = widths(tmp_path / "out")
    assert {b for n, b in found.items() if n.endswith(("k_proj", "v_proj"))} == bits
    assert caplog.text.count("layers.0.self_attn.k_proj stays dense") == (0 if bits else 1)
    if "target_bpw" in options:
        assert stored_bits(tmp_path / "out") <= 5.5


def test_linears_without_a_gradient_are_named_and_get_what_is_left(
    pico: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    compress.quantize(model, "rtn", tmp_path / "out", group_size=32, dataset=text, nsamples=2, seqlen=16, target_bpw=5.5)
    assert "have no gradient here" in caplog.text
    assert stored_bits(tmp_path / "out") > 5


def test_the_hint_of_a_refused_budget_is_accepted(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    data = ["--dataset", CALIBRATION, "--nsamples", 1, "--seqlen", 32]
    args = ["quantize", EXAMPLE, "-m", "gwq", *data, "--dry-run", "--target-bpw"]
    refused = cli(*args, 1)
    assert refused.code == 2
    least = refused.err.split("hint: use ")[1].split()[0]
    done = cli(*args, least)
    assert done.code == 0, done.err
    assert "(about)" in done.out

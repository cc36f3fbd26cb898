"""Every artifact that we call loadable loads in stock transformers, in a process that cannot import our packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, STOCK_LOGITS, Outcome, python

import compress

IDS = [[1, 9038, 2501, 263, 931, 727, 471, 263, 2217, 7826, 4257, 365]]


def stock_logits(folder: Path, tmp_path: Path, ids: list[list[int]] = IDS) -> torch.Tensor:
    done = python(STOCK_LOGITS, folder, tmp_path / "logits.pt", json.dumps(ids))
    assert done.returncode == 0, done.stderr[-2000:]
    logits: torch.Tensor = torch.load(tmp_path / "logits.pt", weights_only=True)
    return logits


def own_logits(folder: Path, ids: list[list[int]] = IDS) -> torch.Tensor:
    model = compress.load(folder, dtype=torch.float32, exact=True)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor(ids)).logits
    return logits


CASES = [
    *[("rtn", bits, group, symmetric) for bits in (2, 3, 4, 8) for group, symmetric in ((32, True), (32, False), (-1, True))],
    ("rtn", 4, -1, False), ("rtn", 3, 96, False), ("rtn", 3, 16, True), ("awq", 4, 32, True), ("awq", 3, 32, False),
    ("gptq", 4, 32, True), ("rsq", 4, 32, True), ("rsq", 3, 32, False),
]  # fmt: skip


def _options(method: str, bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    data = {"dataset": CALIBRATION, "nsamples": 2, "seqlen": 64} if method != "rtn" else {}
    return {"bits": bits, "group_size": group, "symmetric": symmetric, **data}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case's artifact, and its logits from one process that cannot import us."""
    folder = tmp_path_factory.mktemp("matrix")
    for number, (method, bits, group, symmetric) in enumerate(CASES):
        compress.quantize(EXAMPLE, method, folder / str(number), **_options(method, bits, group, symmetric))
    done = python(STOCK_LOGITS, folder, folder / "{}.pt", json.dumps(IDS), len(CASES))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(map(str, CASES[n])))
def test_stock_transformers_gives_our_logits(number: int, matrix: Path, tmp_path: Path) -> None:
    method, bits, group, symmetric = CASES[number]
    options = _options(method, bits, group, symmetric)
    stock, own = torch.load(matrix / f"{number}.pt", weights_only=True), own_logits(matrix / str(number))
    if symmetric:
        assert torch.equal(stock, own)
    else:  # stock makes them dense at load and rounds them to the checkpoint's fp16: exactly our dense artifact
        assert torch.allclose(stock, own, atol=0.05)
        if method != "rsq":  # which calibrates on what is stored, so that its dense artifact has other codes
            compress.quantize(EXAMPLE, method, tmp_path / "dense", format="dense", **options)
            assert torch.equal(stock, own_logits(tmp_path / "dense"))


@pytest.mark.parametrize("bits", [3, 4])
def test_an_asymmetric_artifact_of_a_float32_model_gives_equal_logits(bits: int, pico: Callable[..., Path], tmp_path: Path) -> None:
    compress.quantize(pico("llama"), "rtn", tmp_path / "out", bits=bits, group_size=32)
    ids = [[5, 17, 99, 64, 33, 21, 8]]
    assert torch.equal(own_logits(tmp_path / "out", ids), stock_logits(tmp_path / "out", tmp_path, ids))


def test_a_dense_artifact_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    compress.quantize(EXAMPLE, "rtn", tmp_path / "out", bits=4, group_size=32, format="dense")
    assert torch.equal(stock_logits(tmp_path / "out", tmp_path), own_logits(tmp_path / "out"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "mistral"])
def test_every_portable_family_loads_in_stock_transformers(family: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 50)
    compress.quantize(pico(family), "awq", tmp_path / "out", group_size=32, dataset=text, nsamples=2, seqlen=32)
    ids = [[5, 17, 99, 64, 33, 21, 8]]
    assert torch.equal(own_logits(tmp_path / "out", ids), stock_logits(tmp_path / "out", tmp_path, ids))


def test_what_stock_transformers_cannot_read_it_refuses(
    pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    compress.quantize(pico("gpt2"), "rtn", out, bits=4, group_size=32)
    done = python(STOCK_LOGITS, out, tmp_path / "logits.pt", json.dumps([[5, 6]]))
    assert done.returncode != 0
    assert "compress-int_grouped" in done.stderr
    assert "it refuses compress-int_grouped on purpose" in cli("inspect", out).out


def test_a_dense_gpt2_export_loads_in_stock_transformers(pico: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress.quantize(pico("gpt2"), "rtn", out, bits=8, group_size=32, format="dense")
    done = python(STOCK_LOGITS, out, tmp_path / "logits.pt", json.dumps([[5, 6, 7]]))
    assert done.returncode == 0, done.stderr[-2000:]
    dense = compress.load(pico("gpt2"), dtype=torch.float32)
    with torch.no_grad():
        want = dense(torch.tensor([[5, 6, 7]])).logits
    got = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert float((got - want).norm() / want.norm()) < 0.05


def test_a_linear_that_stock_loaders_cannot_read_stays_dense(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=1
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    compress.quantize(tmp_path / "model", "rtn", tmp_path / "out", bits=4, group_size=32)
    ids = [[5, 17, 33, 21, 8]]
    assert torch.equal(own_logits(tmp_path / "out", ids), stock_logits(tmp_path / "out", tmp_path, ids))

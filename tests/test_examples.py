"""The training examples: fine-tunes of one base, and models with LOST layers from scratch, both on a few steps of tiny models."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tree

import compress
from compress.errors import CompressError

sys.path.insert(0, str(ROOT / "examples"))  # scripts, not a package
import corpus
import make_finetunes
import pretrain_lost

VERBS, THINGS = ("sees", "hears", "likes"), ("sun", "sea", "hill")
SENTENCES = [f"The {a} {b} the {c}." for a in ("cat", "dog", "owl") for b in VERBS for c in THINGS]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with a .txt corpus, and one of .jsonl files that are split already."""
    (tmp_path / "animals.txt").write_text("\n\n".join(SENTENCES * 6))
    (tmp_path / "sums").mkdir()
    for name, first in (("train", 0), ("valid", 50)):
        rows = [json.dumps({"text": f"{i} and {j} are {i + j}."}) for i in range(first, first + 20) for j in range(8)]
        (tmp_path / "sums" / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "sums" / "NOTICE.txt").write_text("Not to be trained on.")
    return tmp_path


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """A script's main() with a command line."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, args)])
    script.main()


def test_a_corpus_is_split_into_parts_that_share_nothing(texts: Path) -> None:
    train, valid = corpus.split(texts / "animals.txt", 500, 0)
    assert "\n\n".join([*train, valid]) == (texts / "animals.txt").read_text()
    assert 0 < len(valid) < 500 + 80
    train, valid = corpus.split(texts / "sums", 400, 0)
    assert valid.startswith("50 and 0 are 50.")
    assert len(valid) == 400
    assert not any("Not to be trained on" in text for text in train)
    rows = texts / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"Document {i} ends here."}) for i in range(60)))
    train, valid = corpus.split(rows, 200, 0)
    assert not [text for text in train if text in valid]
    assert (train, valid) == corpus.split(rows, 200, 0) != corpus.split(rows, 200, 1)


def test_batches_pass_over_every_window_before_one_comes_again() -> None:
    windows = torch.arange(10).view(5, 2)
    seen = torch.cat(list(corpus.batches(windows, 2, 5, 3)))[:, 0]
    assert sorted(seen[:5].tolist()) == sorted(seen[5:].tolist()) == [0, 2, 4, 6, 8]


def test_fine_tunes_are_ordinary_folders_that_know_their_text_better(
    texts: Path, pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = pico("llama", torch.float16), texts / "out"
    args = ("--base", base, "--out", out, "--steps", 30, "--seqlen", 32, "--lr", 3e-3, "--device", "cpu")
    both = ("--corpus", f"animals={texts / 'animals.txt'}", "--corpus", f"sums={texts / 'sums'}")
    run(make_finetunes, monkeypatch, *args, *both)
    table = json.loads((out / "finetunes.json").read_text())
    models = {}
    for name in ("animals", "sums"):
        assert table[name]["tuned"] < 0.7 * table[name]["base"]
        assert f"{table[name]['tuned']:9.3f}" in capsys.readouterr().out or name == "sums"
        models[name] = compress.load(out / name, dtype="float32")
        assert json.loads((out / name / "config.json").read_text())["dtype"] == "float16"
        assert (out / name / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        measured = compress.evaluate(out / name, text=out / name / "valid.txt", seqlen=32, dtype="float32").metrics[0].value
        assert measured == pytest.approx(table[name]["tuned"], rel=1e-5)
    weight = [model.model.layers[0].mlp.up_proj.weight for model in models.values()]
    assert not torch.equal(*weight)

    first = tree(out)
    run(make_finetunes, monkeypatch, *args, *both)  # kept
    assert tree(out) == first
    again = texts / "again"
    run(make_finetunes, monkeypatch, *args[:2], "--out", again, *args[4:], *both[:2])
    assert (again / "animals/model.safetensors").read_bytes() == first["animals/model.safetensors"]
    with pytest.raises(CompressError, match="animals: exists, made with other settings"):
        run(make_finetunes, monkeypatch, *args, *both, "--seed", 1)


def test_mistakes_and_explosions_are_named(texts: Path, pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--base", pico("llama"), "--out", texts / "out", "--seqlen", 16, "--device", "cpu")
    for given, why in (
        (("--corpus", "animals"), "not NAME=PATH"),
        (("--corpus", "a/b=x.txt"), "not NAME=PATH"),
        (("--corpus", f"a={texts / 'none.txt'}"), "no such file"),
        (("--corpus", f"a={texts / 'animals.txt'}", "--seqlen", 999), "the model's context is 64"),
        (("--corpus", f"a={texts / 'animals.txt'}", "--lr", 1e30), "a: the loss is (nan|inf) at step"),
    ):
        with pytest.raises(CompressError, match=why):
            run(make_finetunes, monkeypatch, *args, *given)
    assert not (texts / "out" / "a").exists()


def test_lost_and_low_rank_models_from_scratch_are_compared_at_equal_parameters(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = texts / "out"
    size = ("--hidden", 32, "--intermediate", 80, "--blocks", 2, "--heads", 2, "--vocabulary", 300, "--rank", 8, "--seqlen", 16)
    run(pretrain_lost, monkeypatch, "--text", texts / "animals.txt", "--out", out, "--steps", 30, "--device", "cpu", *size)
    table = json.loads((out / "table.json").read_text())
    assert list(table) == sorted(pretrain_lost.RATES)
    assert table["low-rank"]["linears"] == table["low-rank-svd"]["linears"]
    assert abs(table["low-rank"]["linears"] - table["lost"]["linears"]) < 32 + 80  # one rank of the largest linear
    assert table["lost"]["linears"] < 0.7 * table["full"]["linears"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for name, row in table.items():
        curve = [r for r in rows if r["variant"] == name]
        assert [r["step"] for r in curve] == list(range(1, 31))
        assert row["valid"] == curve[-1]["valid"] < curve[2]["valid"] - 0.5
        assert row["stored"] == pytest.approx(row["valid"], abs=2e-3)  # factors rounded to float16
        assert f"{name:13s}{row['linears']:10d}" in capsys.readouterr().out or name != "full"
        measured = compress.evaluate(out / name, text=out / "valid.txt", seqlen=16, dtype="float32").metrics[0].value
        assert measured == pytest.approx(math.exp(row["stored"]), rel=1e-4)
    with pytest.raises(CompressError, match="not empty"):
        run(pretrain_lost, monkeypatch, "--text", texts / "animals.txt", "--out", out)
    with pytest.raises(CompressError, match="variant 'lots' is unknown"):
        run(pretrain_lost, monkeypatch, "--variants", "lots")


def test_every_variant_begins_with_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--hidden", "32", "--intermediate", "80", "--blocks", "1", "--rank", "8"])
    options = pretrain_lost.parse()
    dense = pretrain_lost.make_model(options, 300)
    models = {name: pretrain_lost.make_variant(name, dense, options) for name in pretrain_lost.RATES}
    for model in models.values():
        assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    W, layer = dense.model.layers[0].mlp.up_proj.weight, models["lost"].model.layers[0].mlp.up_proj
    assert torch.equal(layer.W_s, W[:, layer.columns])
    low = models["low-rank-svd"].model.layers[0].mlp.up_proj
    U, s, Vh = torch.linalg.svd(W)
    rank = low.params["rank"]
    assert torch.allclose(low.B @ low.A, (U[:, :rank] * s[:rank]) @ Vh[:rank], atol=1e-6)
    assert torch.equal(pretrain_lost.make_model(options, 300).lm_head.weight, dense.lm_head.weight)

"""Calibration: every source gives windows, the same text the same hash, and a bad one a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE

from compress import calibration
from compress.errors import CompressError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return calibration.load_tokenizer(EXAMPLE)


def load(dataset: Path | None, tokenizer: Any, **kw: Any) -> calibration.Calibration:
    return calibration.load(dataset, tokenizer, **{"nsamples": 3, "seqlen": 32, "seed": None, "vocab": 32000, **kw})


DOCS = [f"Once upon a time there was a small dog number {i}. It liked to run and play in the park." for i in range(30)]


def test_text_jsonl_parquet_and_folder_of_the_same_documents_give_the_same_windows(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("\n\n".join(DOCS))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in DOCS))
    pq.write_table(pyarrow.table({"text": DOCS}), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in DOCS))
    found = [load(tmp_path / n, tokenizer) for n in ("a.txt", "a.jsonl", "a.parquet", "folder")]
    assert found[0].tokens.shape == (3, 32)
    assert len({f.sha256 for f in found}) == 1


def test_the_windows_are_the_first_tokens_of_the_text(tokenizer: Any) -> None:
    ids = tokenizer(CALIBRATION.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert load(CALIBRATION, tokenizer, nsamples=4, seqlen=256).tokens.flatten().tolist() == ids[:1024]


def test_a_seed_draws_other_windows_and_the_same_ones_again(tokenizer: Any) -> None:
    first, one, again = (load(CALIBRATION, tokenizer, seed=s) for s in (None, 1, 1))
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.tokens, first.tokens)


def test_the_built_in_text_fills_the_default_number_of_windows(tokenizer: Any) -> None:
    assert load(None, tokenizer, nsamples=128, seqlen=512).tokens.shape == (128, 512)


def test_messages_go_through_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": d}]} for d in DOCS]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    with pytest.raises(CompressError, match="no chat template"):
        load(tmp_path / "chat.jsonl", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
    try:
        assert "<user>" in tokenizer.decode(load(tmp_path / "chat.jsonl", tokenizer).tokens[0])
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("short.txt", "Too short.", "less than one window"),
        ("empty.txt", "  \n", "no text"),
        ("bad.jsonl", "{not json", "line 1"),
        ("fields.jsonl", '{"body": "x"}', "neither"),
        ("latin.txt", b"\xff\xfe\xe9", "UTF-8"),
    ],
)
def test_bad_text_is_one_clear_error(name: str, content: str | bytes, why: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CompressError, match=why):
        load(path, tokenizer)


def test_a_hub_name_without_network_is_one_clear_error(tokenizer: Any) -> None:
    with pytest.raises(CompressError, match="no such dataset"):
        load(Path("nobody/nothing"), tokenizer)


def test_a_foreign_tokenizer_is_caught(tokenizer: Any) -> None:
    with pytest.raises(CompressError, match="outside the model's vocabulary"):
        load(CALIBRATION, tokenizer, vocab=100)


def test_the_same_tokens_cut_otherwise_have_another_hash(tokenizer: Any) -> None:
    one, other = (load(CALIBRATION, tokenizer, nsamples=n, seqlen=s) for n, s in ((4, 64), (8, 32)))
    assert torch.equal(one.tokens.flatten(), other.tokens.flatten())
    assert one.sha256 != other.sha256

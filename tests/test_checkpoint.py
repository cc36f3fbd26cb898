"""The reader and the writer: every way in which a file can lie, and every byte where it was planned."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import source
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.writer import CheckpointWriter, Planned, plan_shards
from compress.errors import CompressError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.arange(7, dtype=torch.int64),
    "d": torch.zeros(0, 4, dtype=torch.float16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_every_tensor_reads_back_whole_by_rows_and_by_pieces(folder: Path) -> None:
    reader = CheckpointReader(folder)
    assert set(reader.names) == set(TENSORS)
    for name, value in TENSORS.items():
        assert torch.equal(reader.read(name), value)
        assert torch.equal(torch.cat([torch.zeros(0, dtype=value.dtype), *reader.chunks(name, 8)]), value.flatten())
    assert torch.equal(reader.read_rows("a.weight", torch.tensor([2, 0])), TENSORS["a.weight"][[2, 0]])


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(CompressError, match=r"model\.safetensors"):
        CheckpointReader(folder)


def test_a_header_that_lies_about_a_shape_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[3,4]', b'"shape":[3,5]'))
    with pytest.raises(CompressError, match=r"a\.weight"):
        CheckpointReader(folder)


def test_trailing_bytes_are_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CompressError, match="length"):
        CheckpointReader(folder)


def test_an_index_that_names_a_missing_tensor_or_file_or_path_is_refused(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for weight_map, why in (
        ({"a.weight": "model.safetensors", "zz": "model.safetensors"}, "zz"),
        ({"a.weight": "model-2.safetensors"}, "missing"),
        ({"a.weight": "../model.safetensors"}, "not a file name"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CompressError, match=why):
            CheckpointReader(folder)


def test_pickle_checkpoints_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CompressError, match="pickle") as error:
        CheckpointReader(tmp_path)
    assert "save_pretrained" in (error.value.hint or "")


def planned() -> list[Planned]:
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.int64": "I64", "torch.float16": "F16"}
    return [Planned(n, names[str(t.dtype)], tuple(t.shape)) for n, t in TENSORS.items()]


@pytest.mark.parametrize("limit", [10**9, 60, 1])
def test_shards_hold_what_was_planned_and_safetensors_reads_them(tmp_path: Path, limit: int) -> None:
    writer = CheckpointWriter(tmp_path, planned(), limit)
    writer.open(fresh=True)
    for name in reversed(TENSORS):
        writer.write(name, TENSORS[name])
    writer.finish()
    found: dict[str, torch.Tensor] = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        assert path.stat().st_size == next(s.size for s in writer.shards if s.file == path.name)
        found |= load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[n], t) for n, t in TENSORS.items())
    reader = CheckpointReader(tmp_path)
    assert all(torch.equal(reader.read(n), t) for n, t in TENSORS.items())


def test_no_shard_is_larger_than_asked_unless_one_tensor_is() -> None:
    plan = [Planned(f"t{i}", "F32", (10,)) for i in range(20)]
    shards = plan_shards(plan, 100)
    assert all(len(s.offsets) == 2 for s in shards)
    assert shards[0].file == "model-00001-of-00010.safetensors"


def test_a_half_written_shard_never_has_its_final_name(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, planned())
    writer.open(fresh=True)
    writer.write("a.weight", TENSORS["a.weight"])
    writer.flush()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors.tmp"]
    with pytest.raises(AssertionError):
        writer.finish()


def test_nan_is_refused_with_the_tensor_name(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, planned())
    writer.open(fresh=True)
    with pytest.raises(CompressError, match=r"a\.weight"):
        writer.write("a.weight", torch.full((3, 4), torch.nan))


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, planned())
    writer.open(fresh=True)
    real: Callable[..., int] = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if offset > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CompressError, match="no space left") as error:
        writer.write("a.weight", TENSORS["a.weight"])
    assert "resumes" in (error.value.hint or "")


def test_companions_are_everything_but_weights_and_rewritten_files(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "config.json", "README.md", "tokenizer.json", "chat_template.jinja",
                 "model.safetensors.index.json", ".gitattributes", "LICENSE", "preprocessor_config.json"):  # fmt: skip
        (tmp_path / name).write_text("x")
    found = [p.name for p in source.companions(tmp_path)]
    assert found == ["LICENSE", "chat_template.jinja", "preprocessor_config.json", "tokenizer.json"]


def test_a_hub_id_without_network_is_one_clear_error() -> None:
    with pytest.raises(CompressError, match="could not be fetched"):
        source.resolve("nobody/nothing-of-the-kind")
    with pytest.raises(CompressError, match="no such folder"):
        source.resolve("no/such/folder")

"""Which kernel path runs: the table that was measured on this machine, what overrides it, and what `--explain` says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from compress_kernels import dispatch, native
from conftest import Outcome

import compress
from compress import tuning
from compress.modules import CompressedLinear

needs_library = pytest.mark.skipif(native.missing() is not None, reason="needs the C++ library")
CASE = dispatch.key("int_grouped", 4, torch.bfloat16, (64, 64))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this machine's table lies in this test."""
    monkeypatch.setattr(dispatch, "folder", lambda: tmp_path / "tables")
    dispatch.read.cache_clear()
    yield dispatch.path()
    dispatch.read.cache_clear()


@pytest.fixture
def artifact(pico: Callable[..., Path], tmp_path: Path) -> Path:
    compress.quantize(pico("llama", torch.bfloat16), "rtn", tmp_path / "out", bits=4, group_size=32)
    return tmp_path / "out"


def paths(folder: Path) -> set[str]:
    return {m.path for m in compress.load(folder).modules() if isinstance(m, CompressedLinear)}


@needs_library
def test_a_table_chooses_the_path_and_the_environment_goes_before_it(
    table: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert paths(artifact) == {"cpu"}
    dispatch.save({CASE: "int4pack"})
    assert paths(artifact) == {"int4pack"}
    monkeypatch.setenv("COMPRESS_BACKEND", "cpu")
    assert paths(artifact) == {"cpu"}
    monkeypatch.delenv("COMPRESS_BACKEND")
    exact = compress.load(artifact, exact=True)
    assert {m.path for m in exact.modules() if isinstance(m, CompressedLinear)} == {"tiled"}


@needs_library
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps({"schema": 2, "paths": {}}), "no table"),
        (json.dumps({"schema": 1, "paths": {CASE: "gpu"}}), "no table"),
        (json.dumps({"schema": 1, "machine": {"cpu": "another"}, "paths": {CASE: "tiled"}}), "another machine"),
    ],
)
def test_a_damaged_or_foreign_table_is_passed_over_with_one_line(
    content: str, said: str, table: Path, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table.parent.mkdir()
    table.write_text(content)
    with caplog.at_level(logging.WARNING, "compress_kernels.dispatch"):
        assert paths(artifact) == {"cpu"}
    assert len(caplog.records) == 1
    assert said in caplog.records[0].getMessage()
    assert table.read_text() == content


def test_a_table_is_for_so_many_threads(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert dispatch.path() != table
    assert dispatch.path().parent == table.parent


@needs_library
def test_tuning_measures_every_path_and_loads_follow_it(table: Path, artifact: Path) -> None:
    cases = list(tuning.tune(["int4", "bitmask"], [(64, 64)], seconds=0.01))
    assert {c.key: set(c.ms) for c in cases} == {
        CASE: {"cpu", "int4pack", "tiled"}, dispatch.key("bitmask", 16, torch.bfloat16, (64, 64)): {"cpu", "dense", "tiled"},
    }  # fmt: skip
    assert cases[0].best == "cpu", "int4pack and tiled would end native decoding"
    assert all(c.best in c.ms and all(len(times) == 2 and min(times) > 0 for times in c.ms.values()) for c in cases)
    tuning.keep(cases[:1])
    tuning.keep(cases[1:])
    assert dispatch.read(table) == {c.key: c.best for c in cases}
    assert paths(artifact) == {cases[0].best}
    assert compress.load(artifact).decoding.path == "native"  # type: ignore[operator, union-attr]


@needs_library
def test_a_faster_path_that_native_decoding_cannot_take_is_named_and_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"cpu": 4.0, "int4pack": 1.0, "dense": 2.0, "tiled": 9.0}
    monkeypatch.setattr(tuning, "_turns", lambda paths, x, limit: {path: [9.0, seconds[path]] for path in paths})
    (case,) = tuning.tune(["int4"], [(64, 64)])
    assert (case.best, case.faster) == ("cpu", "int4pack")
    (case,) = tuning.tune(["bitmask"], [(64, 64)])
    assert (case.best, case.faster) == ("dense", None)
    monkeypatch.setattr(native, "missing", lambda: "it was taken away")
    assert dispatch.candidates(["int4pack", "tiled"]) == ["int4pack", "tiled"]
    assert dispatch.candidates(["dense", "tiled"]) == ["dense", "tiled"]


@needs_library
def test_explain_says_which_path_runs_and_why_no_other(table: Path, artifact: Path, cli: Callable[..., Outcome]) -> None:
    shown = cli("inspect", artifact, "--explain")
    assert shown.code == 0, shown.err
    words = "decoding: native", "cpu ", "q_proj", "int_grouped bits=4", "not int4pack: cpu comes first", "compress bench tune"
    for word in words:
        assert word in shown.out, shown.out
    dispatch.save({CASE: "tiled", CASE.replace("int_grouped", "bitmask"): "dense"})
    facts = json.loads(cli("inspect", artifact, "--explain", "--json").out)
    assert [c["path"] for c in facts["choices"]] == ["tiled"]
    assert facts["choices"][0]["others"]["cpu"] == "it is slower here than tiled, by compress bench tune"
    assert len(facts["choices"][0]["linears"]) == 14
    assert facts["tuned"]
    assert "its path is tiled" in facts["decoding"]

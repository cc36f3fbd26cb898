"""Bad input and bad luck: one error line, one hint, the right exit code, nothing that `verify` would accept."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, Outcome, tree
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(tmp_path: Path, pico: Callable[..., Path]) -> Path:
    """A copy of a pico Llama that a test may damage."""
    return Path(shutil.copytree(pico("llama"), tmp_path / "model"))


def shard(model: Path) -> None:
    """Split the single file in two."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: tensors[n] for n in part}, model / file)
    (model / "model.safetensors").unlink()
    weight_map = {n: f for f, part in halves.items() for n in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def check(done: Outcome, out: Path, why: str, code: int, cli: Callable[..., Outcome]) -> None:
    lines = [line for line in done.err.splitlines() if line.startswith(("error:", "hint:"))]
    assert done.code == code, done.err
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], done.err
    assert why in lines[0], done.err
    assert "Traceback" not in done.err
    assert not out.exists()
    assert cli("verify", out).code != 0
    partial = out.with_name(out.name + ".partial")
    assert cli("verify", partial / "artifact").code != 0


def truncate(model: Path) -> None:
    shard(model)
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wrong_index(model: Path) -> None:
    shard(model)
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    index["weight_map"][name] = next(f for n, f in index["weight_map"].items() if f != index["weight_map"][name])
    path.write_text(json.dumps(index))


def missing_shard(model: Path) -> None:
    shard(model)
    (model / "model-00001-of-00002.safetensors").unlink()


def nan_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def inf_embedding(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][:] = torch.inf
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def missing_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return apply


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "truncated"),
        (wrong_index, "model.layers.1.mlp.up_proj.weight"),
        (missing_shard, "model-00001-of-00002.safetensors: missing"),
        (nan_weight, "model.layers.1.mlp.up_proj.weight: holds NaN"),
        (inf_embedding, "model.embed_tokens.weight: holds NaN or Inf"),
        (missing_tensor, "model.layers.0.mlp.up_proj.weight is missing"),
        (edit(model_type="warp_drive"), "unknown model family 'warp_drive'"),
        (edit(intermediate_size=256), "config.json asks for"),
        (edit(quantization_config={"quant_method": "gptq"}), "already compressed (gptq)"),
        (no_config, "config.json"),
        (broken_config, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_damaged_checkpoint_is_one_clear_error(
    damage: Callable[[Path], None], why: str, method: str, model: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    damage(model)
    out = tmp_path / "out"
    done = cli(
        "quantize",
        model,
        "-m",
        method,
        "--group-size",
        32,
        "--dataset",
        CALIBRATION,
        "--nsamples",
        2,
        "--seqlen",
        16,
        "-o",
        out,
    )
    check(done, out, why, 1, cli)


@pytest.mark.parametrize(
    ("args", "why", "code"),
    [
        (["--group-size", 48], "cannot be split into groups of 48", 2),
        (["--bits", 5], "--bits 5", 2),
        (["--bits", "four"], "--bits", 2),
        (["--format", "gguf"], "--format 'gguf'", 2),
        (["--format", "awq", "--bits", 3], "4", 2),
        (["--device", "tpu"], "--device 'tpu'", 2),
        (["--states", "cloud"], "--states", 2),
        (["--nsamples", 0], "--nsamples 0", 2),
        (["--seqlen", 100000], "--seqlen 100000", 2),
        (["--batch-size", 0], "--batch-size 0", 2),
        (["--duo", "maybe"], "--duo 'maybe'", 2),
        (["--max-shard-size", "big"], "--max-shard-size 'big'", 2),
        (["--ignore", "re:("], "not a regular expression", 2),
        (["--ignore", "re:nothing"], "matches no linear", 2),
        (["--ignore", "re:.*"], "every linear is ignored", 2),
        (["-m", "gptqq"], "unknown method 'gptqq'", 2),
        (["--bitz", 4], "--bitz", 2),
        (["--dataset", "no/such/file.txt"], "no such", 2),
    ],
)
def test_a_wrong_option_is_a_usage_error(
    args: list[object], why: str, code: int, model: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    rest = ["--group-size", 32] if "--group-size" not in args else []
    check(cli("quantize", model, *rest, *args, "-o", out), out, why, code, cli)


def test_no_model_no_output_and_short_text_are_errors(model: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    out = tmp_path / "out"
    check(cli("quantize", tmp_path / "nowhere", "-o", out), out, "no such folder", 2, cli)
    check(cli("quantize", "nobody/no-such-model", "-o", out), out, "could not be fetched", 1, cli)
    check(cli("quantize", model, "--group-size", 32), out, "where to", 2, cli)
    short = tmp_path / "short.txt"
    short.write_text("Hello")
    check(cli("quantize", model, "--group-size", 32, "--dataset", short, "-o", out), out, "less than one window", 1, cli)


def test_the_folder_of_another_job_is_not_touched(model: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    out = tmp_path / "out"
    assert cli("quantize", model, "-m", "rtn", "--group-size", 32, "-o", out).code == 0
    before = tree(out)
    done = cli("quantize", model, "-m", "rtn", "--group-size", 64, "-o", out)
    assert done.code == 1
    assert "another job" in done.err
    assert tree(out) == before
    assert cli("quantize", model, "-m", "rtn", "--group-size", 64, "-o", out, "--restart").code == 0
    assert tree(out) != before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for more in ([], ["--restart"]):
        assert cli("quantize", model, "-m", "rtn", "--group-size", 32, "-o", mine, *more).code == 1
        assert (mine / "thesis.txt").read_text() == "years of work"
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("x")
    done = cli(
        "quantize",
        model,
        "-m",
        "rtn",
        "--group-size",
        32,
        "-o",
        tmp_path / "x",
        "--work-dir",
        tmp_path / "work",
        "--restart",
    )
    assert done.code == 1
    assert (tmp_path / "work" / "thesis.txt").exists()


def test_unfinished_work_of_another_job_is_kept_until_restart(
    model: Path, tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fill_disk_after(patch, 40_000)
        assert cli("quantize", model, "-m", "rtn", "--group-size", 32, "-o", out).code == 1
    done = cli("quantize", model, "-m", "rtn", "--group-size", 64, "-o", out)
    assert done.code == 1
    assert "unfinished work of another job" in done.err
    assert cli("quantize", model, "-m", "rtn", "--group-size", 64, "-o", out, "--restart").code == 0
    assert cli("verify", out).code == 0


def fill_disk_after(patch: pytest.MonkeyPatch, limit: int) -> None:
    real, written = os.pwrite, [0]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        written[0] += len(data)
        if written[0] > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    patch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("limit", [0, 10_000, 60_000, 105_000])
def test_a_disk_that_fills_up_stops_cleanly_and_the_rerun_finishes_with_the_same_bytes(
    limit: int, model: Path, tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["quantize", model, "-m", "rtn", "--group-size", 32, "-o"]
    assert cli(*args, tmp_path / "whole").code == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fill_disk_after(patch, limit)
        check(cli(*args, out), out, "no space left", 1, cli)
    assert cli(*args, out).code == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_a_file_size_limit_is_a_clear_error(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    out = tmp_path / "out"
    code = "from compress.cli import main; main()"
    args = [sys.executable, "-c", code, "quantize", EXAMPLE, "-m", "rtn", "--group-size", "32", "-o", out]
    limited = subprocess.run(
        args, capture_output=True, text=True, check=False, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000)),
    )  # fmt: skip
    check(Outcome(limited.returncode, limited.stdout, limited.stderr), out, "file too large", 1, cli)
    assert subprocess.run(args, capture_output=True, check=False, timeout=300).returncode == 0
    assert cli("verify", out).code == 0


def test_too_small_a_disk_is_noticed_before_the_work(
    model: Path, tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    out = tmp_path / "out"
    check(cli("quantize", model, "-m", "rtn", "--group-size", 32, "-o", out), out, "the disk has 0.00 GB free", 1, cli)


def damage_artifact(out: Path, how: str) -> None:
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[:-8])
    elif how == "remove":
        (out / "tokenizer.json").unlink()
    elif how == "add":
        (out / "extra.bin").write_bytes(b"x")
    elif how == "manifest":
        (out / "manifest.json").write_text("{}")
    elif how == "config":
        (out / "config.json").write_text((out / "config.json").read_text().replace('"num_bits": 4', '"num_bits": 8'))


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "add", "manifest", "config"])
def test_verify_notices_every_damage(how: str, model: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    out = tmp_path / "out"
    assert cli("quantize", model, "-m", "rtn", "--group-size", 32, "-o", out).code == 0
    assert cli("verify", out).code == 0
    damage_artifact(out, how)
    done = cli("verify", out)
    assert done.code == 1
    assert done.err.startswith("error:")


def test_two_runs_of_one_job_do_not_meet(model: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    from compress.pipeline.resume import WorkDir

    work = WorkDir(tmp_path / "out.partial", "someone", restart=False)
    done = cli("quantize", model, "-m", "rtn", "--group-size", 32, "-o", tmp_path / "out")
    work.close()
    assert done.code == 1
    assert "another run" in done.err


def test_verify_and_inspect_refuse_what_is_no_artifact(model: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    for verb in ("verify", "inspect"):
        assert cli(verb, model).code == 1
        assert cli(verb, tmp_path / "nowhere").code == 2


def test_a_kept_work_folder_survives_a_second_run_and_strangers_work_is_never_tidied_away(
    model: Path, tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    args = ["quantize", model, "-m", "rtn", "--group-size", 32, "-o", out]
    for _ in range(2):
        assert cli(*args, "--work-dir", work).code == 0
        assert (work / "report.jsonl").exists()
    with monkeypatch.context() as patch:  # another job for the same OUT dies half-way
        fill_disk_after(patch, 40_000)
        assert cli("quantize", model, "-m", "rtn", "--group-size", 64, "-o", out, "--restart").code == 1
    partial = out.with_name("out.partial")
    before = tree(partial)
    assert cli(*args).code == 0
    assert tree(partial) == before
    # a killed --restart goes on without it
    assert cli("quantize", model, "-m", "rtn", "--group-size", 64, "-o", out).code == 0
    assert json.loads((out / "manifest.json").read_text())["config"]["group_size"] == 64
    assert not partial.exists()


def test_going_on_never_replaces_what_appeared_at_out_meanwhile(
    model: Path, tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    args = ["quantize", model, "-m", "rtn", "--group-size", 32, "-o", out]
    with monkeypatch.context() as patch:
        fill_disk_after(patch, 40_000)
        assert cli(*args).code == 1
    assert cli("quantize", model, "-m", "rtn", "--group-size", 64, "-o", other).code == 0
    other.rename(out)
    done = cli(*args)
    assert done.code == 1
    assert "another job" in done.err
    assert cli(*args, "--restart").code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("verb", [("eval", "--text", __file__), ("generate", "--prompt", "x")], ids=lambda v: v[0])
def test_a_gpu_that_is_not_there_is_a_usage_error(model: Path, cli: Callable[..., Outcome], verb: tuple[str, ...]) -> None:
    done = cli(verb[0], model, *verb[1:], "--device", "cuda")
    assert done.code == 2
    assert "torch sees no such GPU" in done.err


def test_a_shard_that_vanished_between_two_runs_is_an_error_not_zeros(
    model: Path, tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["quantize", model, "-m", "rtn", "--group-size", 32, "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        fill_disk_after(patch, 60_000)
        assert cli(*args).code == 1
    assert json.loads((tmp_path / "out.partial" / "progress.json").read_text())["done"] >= 1
    (tmp_path / "out.partial" / "artifact" / "model.safetensors.tmp").unlink()
    done = cli(*args)
    assert done.code == 1
    assert "gone since the last run" in done.err


def test_output_and_work_folders_may_not_lie_inside_each_other(model: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    args = ["quantize", model, "-m", "rtn", "--group-size", 32]
    for out, work in (("a", "a"), ("a", "a/w"), ("w/a", "w")):
        done = cli(*args, "-o", tmp_path / out, "--work-dir", tmp_path / work)
        assert done.code == 2
        assert "inside each other" in done.err


def test_a_missing_parent_folder_is_made(model: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    assert cli("quantize", model, "-m", "rtn", "--group-size", 32, "-o", tmp_path / "deep" / "er" / "out").code == 0
    assert cli("verify", tmp_path / "deep" / "er" / "out").code == 0

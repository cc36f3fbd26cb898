"""What a user does, on the shipped checkpoint: quantize, inspect, verify, evaluate, generate, resume."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, VALID, Outcome, tree

import compress
from compress.checkpoint.reader import CheckpointReader
from compress.formats import int_grouped
from compress.types import Packed

QUICK = ["--dataset", CALIBRATION, "--nsamples", 8, "--seqlen", 128, "--grid", 4, "--keep", 2, "--clip-steps", 4]


@pytest.fixture(scope="module")
def awq4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's artifact, with less calibration data."""
    out = tmp_path_factory.mktemp("awq4") / "out"
    compress.quantize(EXAMPLE, "awq", out, bits=4, group_size=32, dataset=CALIBRATION, nsamples=16)
    return out


def test_inspect_says_what_the_artifact_is(awq4: Path, cli: Callable[..., Outcome]) -> None:
    shown = cli("inspect", awq4)
    assert shown.code == 0
    for word in (
        "awq",
        "bits=4",
        "4.626 bits per weight",
        "15.2M parameters",
        "smaller",
        "worst",
        "transformers",
        "vLLM",
        "search",
    ):
        assert word in shown.out, shown.out
    facts = json.loads(cli("inspect", awq4, "--json").out)
    assert facts["linears"] == 42
    assert facts["bits_linears"] == pytest.approx(4 + (16 + 4) / 32 + 2 * 64 / 288 / 500, abs=5e-3)


def test_verify_accepts_it_and_deep_verify_compares_with_the_source(awq4: Path, cli: Callable[..., Outcome]) -> None:
    assert cli("verify", awq4, "--deep", "--source", EXAMPLE).code == 0


def test_evaluation_beats_plain_rounding_and_reports_into_the_artifact(
    awq4: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    rtn = cli("quantize", EXAMPLE, "-m", "rtn", "--bits", 4, "--group-size", 32, "-o", tmp_path / "rtn")
    assert rtn.code == 0, rtn.err
    found = {}
    for name, path in (("awq", awq4), ("rtn", tmp_path / "rtn")):
        done = cli("eval", path, "--baseline", EXAMPLE, "--text", VALID, "--windows", 20, "--batch-size", 4, "--json")
        assert done.code == 0, done.err
        found[name] = {m["name"]: m for m in json.loads(done.out)["metrics"]}
    assert found["awq"]["perplexity"]["baseline"] < found["awq"]["perplexity"]["value"] < found["rtn"]["perplexity"]["value"]
    assert found["awq"]["KL"]["value"] < found["rtn"]["KL"]["value"]
    assert (awq4 / "report.json").exists()
    assert cli("verify", awq4).code == 0


def test_generation_continues_the_prompt_sensibly(awq4: Path, cli: Callable[..., Outcome]) -> None:
    done = cli("generate", awq4, "--prompt", "Once upon a time", "--max-new-tokens", 30)
    assert done.code == 0, done.err
    assert done.out.startswith("Once upon a time")
    assert "there was a" in done.out


def test_equal_jobs_give_equal_bytes_and_a_finished_job_is_not_repeated(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    args = ["quantize", EXAMPLE, "-m", "awq", "--bits", 3, "--group-size", 32, *QUICK, "-o"]
    for name in ("a", "b"):
        assert cli(*args, tmp_path / name).code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    again = cli(*args, tmp_path / "a")
    assert again.code == 0
    assert "already there" in again.err
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


@pytest.mark.parametrize("option", [["--states", "disk"], ["--max-shard-size", "1MB"], ["--propagate"], ["--search", "full"]])
def test_options_that_change_the_way_still_give_a_verified_artifact(
    option: list[str], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    args = ["quantize", EXAMPLE, "-m", "awq", "--group-size", 32, *QUICK, *option, "-o", tmp_path / "out"]
    done = cli(*args)
    assert done.code == 0, done.err
    assert cli("verify", tmp_path / "out").code == 0
    if option[0] == "--max-shard-size":
        shards = list((tmp_path / "out").glob("model-*.safetensors"))
        assert len(shards) > 2
        assert sum(s.stat().st_size > 1_100_000 for s in shards) == 1  # the embedding is larger than a shard


def test_states_on_disk_change_no_byte(tmp_path: Path) -> None:
    for where in ("ram", "disk"):
        compress.quantize(EXAMPLE, "awq", tmp_path / where, group_size=32, dataset=CALIBRATION, nsamples=4, seqlen=64, states=where)
    assert tree(tmp_path / "ram") == tree(tmp_path / "disk")


def test_ignored_linears_stay_dense_and_still_take_their_scales(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    out = tmp_path / "out"
    args = ["quantize", EXAMPLE, "-m", "awq", "--group-size", 32, *QUICK, "--ignore", "re:.*k_proj", "-o", out]
    assert cli(*args).code == 0
    reader = CheckpointReader(out)
    assert "model.layers.0.self_attn.k_proj.weight" in reader
    assert "model.layers.0.self_attn.q_proj.weight_packed" in reader
    assert "model.layers.0.self_attn.k_proj" in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    source = CheckpointReader(EXAMPLE).read("model.layers.0.self_attn.k_proj.weight")
    assert not torch.equal(reader.read("model.layers.0.self_attn.k_proj.weight"), source)
    # undoing the scales of the norm gives the source back: the function is unchanged
    name = "model.layers.0.input_layernorm.weight"
    s = CheckpointReader(EXAMPLE).read(name).float() / reader.read(name).float()
    assert torch.allclose(reader.read("model.layers.0.self_attn.k_proj.weight").float() / s, source.float(), rtol=2e-3, atol=1e-4)


def test_formats_hold_the_same_weights(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    args = ["quantize", EXAMPLE, "-m", "rtn", "--bits", 4, "--group-size", 32]
    for layout in ("pack-quantized", "dense", "awq"):
        assert cli(*args, "--format", layout, "-o", tmp_path / layout).code == 0
        assert cli("verify", tmp_path / layout, "--deep", "--source", EXAMPLE).code == 0
    packed = CheckpointReader(tmp_path / "pack-quantized")
    name = "model.layers.2.mlp.up_proj"
    params = {"bits": 4, "group_size": 32, "symmetric": False}
    suffixes = int_grouped.spec(params, (768, 288), "F16")
    W = int_grouped.dequantize(Packed("int_grouped", 1, params, {s: packed.read(f"{name}.{s}") for s in suffixes}, (768, 288)))
    assert torch.equal(CheckpointReader(tmp_path / "dense").read(f"{name}.weight"), W.half())


def test_the_dry_run_predicts_the_size_exactly_and_reads_no_weight(
    tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["quantize", EXAMPLE, "-m", "awq", "--bits", 3, "--group-size", 32, *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "_fill", lambda *_: pytest.fail("a weight was read"))
        done = cli(*args, "--dry-run", "--json")
    assert done.code == 0, done.err
    predicted = json.loads(done.out)
    real = json.loads(cli(*args, "-o", tmp_path / "out", "--json").out)
    assert predicted["artifact_bytes"] == real["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert predicted["bits_per_weight"] == pytest.approx(real["bits_per_weight"], rel=1e-5)


def run_cli(*args: object, **kwargs: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from compress.cli import main; main()", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)  # type: ignore[call-overload,no-any-return]


def test_killed_ten_times_at_random_moments_the_bytes_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    args = [
        "quantize",
        EXAMPLE,
        "-m",
        "awq",
        "--bits",
        "3",
        "--group-size",
        "32",
        *QUICK,
        "--max-shard-size",
        "1MB",
        "--propagate",
        "-o",
    ]
    start = time.monotonic()
    whole = run_cli(*args, tmp_path / "whole")
    assert whole.wait() == 0
    seconds = time.monotonic() - start
    expected = tree(tmp_path / "whole")
    rng = random.Random(0)
    kills = rounds = 0
    while kills < 10:
        rounds += 1
        out = tmp_path / f"killed{rounds}"
        while not out.exists():
            process = run_cli(*args, out)
            limit = rng.uniform(0.3 * seconds, 1.1 * seconds) if kills < 10 else None
            try:
                process.wait(limit)
                assert process.returncode == 0, process.stderr.read() if process.stderr else ""
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                assert not out.exists() or tree(out) == expected
        assert tree(out) == expected
        if Path(f"{out}.partial").exists():  # killed between the rename and the clean-up: the next run tidies up
            assert run_cli(*args, out).wait() == 0
        assert not Path(f"{out}.partial").exists()


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    args = [
        "quantize",
        EXAMPLE,
        "-m",
        "awq",
        "--group-size",
        "32",
        "--dataset",
        CALIBRATION,
        "--nsamples",
        "64",
        "-o",
        tmp_path / "o",
    ]
    process = run_cli(*args, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("block"):
            process.send_signal(signal.SIGINT)
            break
    err = process.stderr.read()
    assert process.wait() == 130, err
    assert "run the same command again" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("layout", ["pack-quantized", "awq", "dense"])
def test_a_propagating_run_resumes_to_the_same_bytes_in_every_format(
    layout: str, pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states of a resumed run come from what was written: it must be what the unbroken run went on with."""
    from compress.pipeline.forward import Forward

    options = {"group_size": 32, "dataset": _ascii(tmp_path), "nsamples": 4, "seqlen": 32, "propagate": True, "format": layout}
    folder = pico("qwen2", torch.bfloat16)
    compress.quantize(folder, "awq", tmp_path / "whole", **options)
    real = Forward._block

    def dies(self: Forward, index: int) -> tuple[float, float]:
        if index == 1:
            raise KeyboardInterrupt
        return real(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "_block", dies)
        with pytest.raises(KeyboardInterrupt):
            compress.quantize(folder, "awq", tmp_path / "out", **options)
    compress.quantize(folder, "awq", tmp_path / "out", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def _ascii(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path

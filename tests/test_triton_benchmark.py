"""benchmarks/gpu.sh without a GPU: every step of it in the interpreter, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "benchmarks" / "gpu.sh", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


def test_a_dry_run_checks_every_kernel_and_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = run("--dry", "--out", str(out), "--kinds", "W4", "W4+1%", "--rows", "1", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    checked = [row for row in rows if "check" in row]
    assert len(checked) > 20
    assert all(row["good"] for row in checked)
    assert f"{len(checked)} of {len(checked)} checks are right" in done.stdout
    timed = [row for row in rows if "kind" in row]
    assert [(row["kind"], row["M"]) for row in timed] == [(k, M) for k in ("W4 g128", "W4+1% g128") for M in (1, 3)]
    assert [row["batch"] for row in rows if "decode" in row] == [2]
    assert {"a model's logits", "q, k, v and gate, up are one launch each"} <= {row["check"] for row in checked}
    table = json.loads((tmp_path / "gpu-interpreter.json").read_text())
    assert {(row["bits"], row["O"], row["I"], row["M"]) for row in table["rows"]} == {(4, 256, 256, 1), (4, 256, 256, 3)}
    for row in rows:
        assert row["dry"] is True  # nobody takes them for measurements
        assert row["torch"]
        assert row["triton"]
        assert row["commit"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "no CUDA device"),
        (["--dry", "--shapes", "100x100"], "groups of 128"),
        (["--dry", "--rows", "0"], "at least 1"),
        (["--dry", "--kinds", "W5"], "invalid choice"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import gpu

    with pytest.raises(SystemExit) as stop:
        gpu.arguments(arguments)
    assert stop.value.code == 2
    assert why in capsys.readouterr().err


def test_a_wrong_result_is_told_and_marks_what_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    row = {"check": "a product", "dtype": "bfloat16", "error": 0.5, "most": 0.1, "good": False}
    raised = {**row, "raised": "ValueError: no"}
    monkeypatch.setattr(gpu, "checks", lambda *args, **kwargs: iter([{**row, "good": True}, row]))
    monkeypatch.setattr(gpu, "model", lambda device: [raised, {"skipped": "a model", "why": "torch is not installed"}])
    monkeypatch.setattr(gpu, "decode", lambda *args: iter([]))
    monkeypatch.setattr(gpu, "cells", lambda *args: iter([{"skipped": "W4 1x1", "why": "0 minutes are over"}]))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--tune", "0", "--out", str(tmp_path / "rows.jsonl")])
    assert gpu.main() == 1
    told = capsys.readouterr().out
    assert "1 of 3 checks are right" in told
    assert told.count("wrong: ") == 2
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r.get("wrong_checks") for r in rows] == [None] * 4 + [2] * 2


def test_measured_rows_are_drawn_and_dry_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_plot import latest, plot

    row = {"kind": "W4 g128", "shape": [256, 512], "M": 1, "speedup": 2.0, "device": "a GPU"}
    rows = [row, {**row, "speedup": 3.0}, {**row, "M": 4, "speedup": 9.0, "dry": True}, {**row, "wrong_checks": 1}]
    rows.insert(1, {"decode": "a shape", "batch": 8, "speedup": 1.5, "device": "a GPU"})
    assert latest(rows) == {"256x512": {"W4 g128": {1: 3.0}}, "a token, by batch": {"a shape": {8: 1.5}}}  # the last one counts
    assert "256x512" in plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no measured row"):
        plot(rows[3:], tmp_path / "plot.png")

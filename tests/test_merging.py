"""`compress merge`: formulas on whole checkpoints, identities in k and alpha, choice by validation text, resume, errors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, tree
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint import manifest
from compress.errors import CompressError
from compress.methods._taskmask import LAMBDAS
from compress.pipeline import blend, tensors

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(pico: Callable[..., Path]) -> Path:
    return pico("llama", torch.float16)


@pytest.fixture(scope="module")
def tunes(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three fine-tunes whose deltas, norms' included, are multiples of 2^-9: sums of them are exact and often cancel."""
    folder, made = tmp_path_factory.mktemp("merge"), {}
    for seed, name in enumerate("abc"):
        made[name] = Path(shutil.copytree(base, folder / name))
        g = torch.Generator().manual_seed(seed)
        own = {
            n: (W.float() + torch.randint(-9, 10, W.shape, generator=g) / 512)
            for n, W in load_file(base / "model.safetensors").items()
        }
        save_file(own, made[name] / "model.safetensors", {"format": "pt"})  # float32, the base is float16
    return made


def deltas(base: Path, tunes: dict[str, Path]) -> tuple[Tensors, Tensors]:
    """theta_0, and tau (T, …) of every tensor, fp32."""
    W0 = {n: W.float() for n, W in load_file(base / "model.safetensors").items()}
    own = [load_file(p / "model.safetensors") for p in tunes.values()]
    return W0, {n: torch.stack([o[n] - W for o in own]) for n, W in W0.items()}


def flat(found: Tensors, task: int) -> torch.Tensor:
    return torch.cat([found[n][task].flatten() for n in sorted(found)])


def test_task_arithmetic_is_its_formula_in_the_bases_dtype(base: Path, tunes: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = compress.merge(base, tunes, out, method="task-arithmetic", alpha=0.25)
    W0, tau = deltas(base, tunes)
    got = load_file(out / "model.safetensors")
    assert sorted(got) == sorted(W0)
    for name, W in got.items():
        assert W.dtype == torch.float16
        assert torch.equal(W, (W0[name] + 0.25 * tau[name].sum(0)).half()), name
    assert report.alpha == 0.25
    logits = compress.load(out, dtype=torch.float32)(torch.tensor([[5, 6, 7]])).logits
    assert torch.isfinite(logits).all()


def test_consensus_in_k(base: Path, tunes: dict[str, Path], tmp_path: Path) -> None:
    made = {k: tmp_path / str(k) for k in range(5)}
    for k, out in made.items():
        compress.merge(base, tunes, out, method="consensus", k=k, alpha=0.5, lam=0.6)
    compress.merge(base, tunes, tmp_path / "ta", method="task-arithmetic", alpha=0.5)
    compress.merge(base, tunes, tmp_path / "tall", method="tall-ta", alpha=0.5, lam=0.6)
    weights = {k: load_file(out / "model.safetensors") for k, out in made.items()}
    same = lambda a, b: all(torch.equal(a[n], b[n]) for n in a)  # noqa: E731
    assert same(weights[0], load_file(tmp_path / "ta" / "model.safetensors"))
    assert same(weights[1], load_file(tmp_path / "tall" / "model.safetensors"))
    assert same(weights[4], load_file(base / "model.safetensors"))
    W0, tau = deltas(base, tunes)
    total = torch.zeros(4, dtype=torch.int64)
    for name, t in tau.items():
        v = t.sum(0)
        counts = sum((x.abs() > 0.6 * (v - x).abs()).int() for x in t)
        assert torch.equal(weights[2][name], (W0[name] + 0.5 * (v * (counts >= 2))).half()), name
        total += torch.bincount(counts.flatten(), minlength=4)
        known = manifest.read(made[2])["merge"]["counts"][name]
        assert known == torch.bincount(counts.flatten(), minlength=4).tolist()
    assert min(total.tolist()) > 0
    one = {"a": tunes["a"]}
    compress.merge(base, one, tmp_path / "one", method="consensus", k=1, alpha=1.0)
    W = {n: x.half() for n, x in load_file(tunes["a"] / "model.safetensors").items()}
    assert same(load_file(tmp_path / "one" / "model.safetensors"), W)


@pytest.mark.parametrize("room", [tensors.ROOM, 64 * 17 * 3])
def test_ties_has_one_exact_threshold_per_fine_tune_over_the_whole_model(
    room: int, base: Path, tunes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "ROOM", room)
    out = tmp_path / "out"
    compress.merge(base, tunes, out, method="ties", density=0.13)
    W0, tau = deltas(base, tunes)
    whole = torch.stack([flat(tau, t) for t in range(3)])
    total = whole.shape[1]
    limits = [float(w.abs().kthvalue(total - int(total * 0.13)).values) for w in whole]  # as ties_utils.topk_values_mask
    kept = torch.stack([w * (w.abs() >= limit) for w, limit in zip(whole, limits, strict=True)])
    sign = kept.sum(0).sign()
    majority = sign.sum().sign()
    assert (sign == 0).any()
    sign[sign == 0] = majority
    agree = torch.where(sign > 0, kept > 0, kept < 0)
    want = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    got, start = load_file(out / "model.safetensors"), 0
    for name in sorted(W0):
        part = want[start : start + W0[name].numel()].view(W0[name].shape)
        assert torch.equal(got[name], (W0[name] + part).half()), name
        start += part.numel()


def test_alpha_and_lambda_are_those_of_the_least_loss(base: Path, tunes: dict[str, Path], tmp_path: Path) -> None:
    from compress.evaluation import evaluate

    texts = {n: tmp_path / f"{n}.txt" for n in tunes}
    for name, path in texts.items():
        path.write_text(f"{name} quick brown foxes jump over the lazy dogs. " * 12)
    out = tmp_path / "out"
    report = compress.merge(base, tunes, out, method="consensus", validation=texts, validation_windows=2, seqlen=32)
    assert 0.1 <= report.alpha <= 1.0
    assert 0.1 <= report.alpha <= 1.0

    def loss(model: Path, name: str) -> float:
        return math.log(evaluate(model, text=texts[name], windows=2, seqlen=32)["perplexity"].value)

    rows = report.tasks
    for name in tunes:
        assert rows[name]["loss"] == pytest.approx(loss(out, name), abs=1e-4)
        assert rows[name]["own"] == pytest.approx(loss(tunes[name], name), abs=2e-3)  # ours is judged in the base's fp16
        assert rows[name]["lambda"] in LAMBDAS
    options = {"validation": texts, "validation_windows": 2, "seqlen": 32}
    chosen = compress.merge(base, tunes, tmp_path / "chosen", method="task-arithmetic", **options)
    best = sum(chosen.tasks[n]["loss"] / chosen.tasks[n]["own"] for n in tunes)
    others = []
    for alpha in {0.1, 0.5, 1.0} - {chosen.alpha}:
        hand = tmp_path / f"hand{alpha}"
        compress.merge(base, tunes, hand, method="task-arithmetic", alpha=alpha)
        others.append(sum(loss(hand, n) / rows[n]["own"] for n in tunes))
    assert best <= min(others) + 1e-6
    assert max(others) > best + 1e-3


def test_stopped_and_run_again_gives_the_same_bytes(
    base: Path, tunes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def stop(p: Any) -> None:
        if p.block == 7:
            raise Killed

    monkeypatch.setattr(blend, "STEP", 1)
    for method in ("ties", "consensus"):
        whole, out = tmp_path / f"whole-{method}", tmp_path / f"out-{method}"
        compress.merge(base, tunes, whole, method=method)
        with pytest.raises(Killed):
            compress.merge(base, tunes, out, method=method, progress=stop)
        assert not out.exists()
        assert compress.merge(base, tunes, out, method=method).resumed
        assert tree(out) == tree(whole)


def test_a_merged_checkpoint_is_ordinary(base: Path, tunes: dict[str, Path], tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    out = tmp_path / "out"
    done = cli("merge", base, *tunes.values(), "-m", "consensus", "-o", out)
    assert done.code == 0, done.err
    assert "3 fine-tunes merged, alpha 0.4" in done.out
    assert "lambda 0.2" in done.out
    assert cli("verify", out).code == 0
    assert "an ordinary dense checkpoint" in cli("inspect", out).out
    assert compress.quantize(out, "rtn", tmp_path / "q", bits=8, group_size=32).linears == 14
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert cli("merge", base, *tunes.values(), "-m", "tallmask", "-o", tmp_path / "x").code == 2
    assert cli("merge", base, *tunes.values(), "-m", "ties", "--density", "1.5", "-o", tmp_path / "x").code == 2


def test_what_cannot_be_merged_is_refused(base: Path, tunes: dict[str, Path], tmp_path: Path) -> None:
    grown = Path(shutil.copytree(tunes["a"], tmp_path / "grown"))
    weights = load_file(grown / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(2, 64)])
    save_file(weights, grown / "model.safetensors", {"format": "pt"})
    config = json.loads((grown / "config.json").read_text())
    (grown / "config.json").write_text(json.dumps({**config, "vocab_size": 130}))
    with pytest.raises(CompressError, match=r"grown: .* has 130 rows, the base has 128"):
        compress.merge(base, [tunes["b"], grown], tmp_path / "out")
    copy = Path(shutil.copytree(tunes["a"], tmp_path / "copy"))
    with pytest.raises(CompressError, match="a and copy are the same fine-tune"):
        compress.merge(base, [tunes["a"], copy], tmp_path / "out")
    with pytest.raises(CompressError, match=r"--ignore 're:norm' matches no tensor"):
        compress.merge(base, {n: tunes[n] for n in "ab"}, tmp_path / "out", ignore=["re:norm"])
    with pytest.raises(CompressError, match="b has no text or is no task"):
        compress.merge(base, {n: tunes[n] for n in "ab"}, tmp_path / "out", validation={"a": base / "config.json"})
    assert not (tmp_path / "out").exists()

"""SparseGPT with outputs weighted by the loss's gradient: rows and linears compete, counts stay exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, VALID, Outcome, tree

import compress
from compress.checkpoint import manifest
from compress.errors import CompressError
from compress.methods import _masks, _solvers, sparsegpt
from compress.methods._sparse_solver import sparsify
from compress.types import Block, Progress

GRADIENT: dict[str, Any] = {"importance": "gradient", "scope": "model", "nsamples": 4, "seqlen": 16}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


def problem(O: int = 24, I: int = 160) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (O, I), a correlated H (I, I), and outputs of very different weight (O,)."""
    X = randn(3 * I, I, seed=1) @ (torch.eye(I) + 0.3 * randn(I, I, seed=2) / I**0.5)
    return randn(O, I), X.T @ X / len(X), (4.0 * randn(O, seed=3)).exp()


def test_rows_of_equal_weight_change_nothing() -> None:
    W, H, _ = problem()
    plain, weighed = (sparsify(W, _solvers.factorize(H.clone(), 0.01), outputs=o) for o in (None, torch.full((24,), 0.25)))
    assert torch.equal(plain.mask, weighed.mask)
    assert torch.equal(plain.W, weighed.W)


def test_weighed_rows_lower_the_weighed_loss_at_the_same_count() -> None:
    W, H, d = problem()
    losses = []
    for outputs in (None, d):
        done = sparsify(W, _solvers.factorize(H.clone(), 0.01), outputs=outputs)
        assert int((~done.mask).sum()) == 24 * 160 // 2
        losses.append(float(d @ (((done.W - W) @ H) * (done.W - W)).sum(1)))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("gone", [0, 1, 1000, 3839, 3840])
def test_any_number_of_weights_goes_exactly(gone: int) -> None:
    W, H, d = problem()
    done = sparsify(W, _solvers.factorize(H.clone(), 0.01), outputs=d, gone=gone)
    assert int((~done.mask).sum()) == gone
    assert not done.W[~done.mask].any()


def test_an_output_weighs_as_its_squared_gradient_and_none_is_free() -> None:
    weights = {n: randn(3, 4, seed=i) for i, n in enumerate(("q", "expert"))}
    config = sparsegpt.Config(importance="gradient")
    reducer = sparsegpt.reducer(Block(0, weights, {}, ()), config)
    assert reducer is not None
    dy = [randn(5, 3, seed=7), randn(5, 3, seed=8)]
    for g in dy:
        g[:, 2] = 0.0
        reducer.add("q", randn(5, 4), g)
    found = reducer.result()
    want = sum(g.square().sum(0) for g in dy)
    assert isinstance(want, torch.Tensor)
    assert torch.allclose(found["minded:q"][:2], want[:2])
    assert float(found["minded:q"][2]) == pytest.approx(1e-3 * float(want.mean()), rel=1e-5)
    assert torch.allclose(found["minded:expert"], want.mean().expand(3))  # it saw no token: what is usual in the block
    assert sparsegpt.reducer(Block(0, {}, {}, ()), sparsegpt.Config()) is None


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_share_of_the_model_is_exact_and_linears_differ(
    share: float, pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    compress.prune(pico("llama", torch.bfloat16), "sparsegpt", tmp_path / "out", dataset=text, sparsity=share, **GRADIENT)
    known = manifest.read(tmp_path / "out")["linears"].values()
    total = sum(e["shape"][0] * e["shape"][1] for e in known)
    assert sum(e["params"]["nnz"] for e in known) == total - _masks.zeros(share, total)
    densities = {e["params"]["nnz"] / (e["shape"][0] * e["shape"][1]) for e in known}
    assert len(densities) == (1 if share == 1.0 else len(known))


@pytest.mark.parametrize("stop", [("survey", 1), ("blocks", 0)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    stop: tuple[str, int], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, options = pico("llama", torch.bfloat16), {"dataset": text, **GRADIENT}
    compress.prune(model, "sparsegpt", tmp_path / "whole", **options)

    def watch(p: Progress) -> None:
        if stop == ("blocks" if p.error is not None else p.what, p.block):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.prune(model, "sparsegpt", tmp_path / "out", progress=watch, **options)
    assert compress.prune(model, "sparsegpt", tmp_path / "out", **options).resumed
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_families(family: str, pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    from compress.audit import verify, verify_deep

    model = pico(family, torch.bfloat16)
    compress.prune(model, "sparsegpt", tmp_path / "out", dataset=text, **GRADIENT)
    assert verify(tmp_path / "out") == []
    assert verify_deep(tmp_path / "out", model) == []


def test_quality_shares_out_over_the_model_where_a_share_is_asked() -> None:
    best = sparsegpt.Config(quality=True)
    assert (best.importance, best.scope, best.recover > 0, best.propagate) == ("gradient", "model", True, True)
    assert sparsegpt.Config(quality=True, pattern="2:4").importance == "none"
    assert sparsegpt.Config(quality=True, scope="row").importance == "none"


def test_counts_by_the_loss_beat_equal_shares_on_a_real_model(tmp_path: Path) -> None:
    """15.7 with equal shares, 14.3 by the loss on all windows; here few of them."""
    found = []
    for number, options in enumerate(({}, {"importance": "gradient", "scope": "model"})):
        out = tmp_path / str(number)
        compress.prune(EXAMPLE, "sparsegpt", out, dataset=CALIBRATION, nsamples=8, seqlen=128, sequential=False, **options)
        found.append(compress.evaluate(out, text=VALID, windows=16, batch_size=8)["perplexity"].value)
    assert found[1] < 0.97 * found[0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--scope", "model"], "--scope model compares linears by the loss"),
        (["--importance", "gradients"], "--importance 'gradients' is unknown"),
        (["--importance", "gradient", "--pattern", "2:4"], "weighs rows against each other"),
        (["--importance", "gradient", "--scope", "row"], "weighs rows against each other"),
        (["--samples", "0"], "--samples 0"),
    ],
)
def test_wrong_options_are_usage_errors(options: list[str], why: str, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    done = cli("prune", EXAMPLE, "-m", "sparsegpt", *options, "-o", tmp_path / "out")
    assert (done.code, why in done.err, "hint:" in done.err) == (2, True, True), done.err


def test_a_head_that_gradients_do_not_know_is_refused(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="logit"):
        compress.prune(pico("cohere"), "sparsegpt", tmp_path / "out", dataset=text, **GRADIENT)

"""Pruning: the identities of the specification, and artifacts that load, quantize and resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STOCK_LOGITS, Outcome, python, tree

import compress
from compress.checkpoint import manifest
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.methods import _masks, _solvers, _sparse_solver, _sparsity, sparsegpt


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hessian(inputs: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A correlated second moment."""
    x = randn(4 * inputs, inputs, seed=seed, dtype=dtype) @ randn(inputs, inputs, seed=seed + 1, dtype=dtype)
    return x.T @ x / len(x)


# -- counts and masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.52, 0.7, 1.0])
def test_counts_are_exact_and_ties_go_first(share: float) -> None:
    score = torch.randint(0, 4, (7, 40), generator=torch.Generator().manual_seed(3)).float()
    kept = _masks.keep_highest(score, _masks.zeros(share, 40))
    assert (~kept).sum(1).tolist() == [_masks.zeros(share, 40)] * 7
    for row, mask in zip(score, kept, strict=True):
        order = row.argsort(stable=True)
        assert torch.equal(mask, torch.ones(40, dtype=torch.bool).scatter(0, order[: _masks.zeros(share, 40)], False))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (3, 5), (8, 16), (1, 2)])
def test_n_of_m_keeps_the_largest_of_every_group(n: int, m: int) -> None:
    score = torch.randint(0, 5, (6, 4 * m), generator=torch.Generator().manual_seed(n)).float()
    kept = _masks.keep_n_of_m(score, n, m).view(-1, m)
    assert (kept.sum(1) == n).all()
    order = score.view(-1, m).argsort(dim=1, stable=True)
    assert torch.equal(kept, torch.ones_like(kept).scatter(1, order[:, : m - n], False))


def test_shares_of_the_model_are_exact_in_total() -> None:
    scores = [[randn(30, 17, seed=i).abs() * 2.0**i for i in range(3)], [torch.ones(11, 13), torch.zeros(5, 5)]]
    blocks = [{str(i): _sparsity.histogram(s) for i, s in enumerate(row)} for row in scores]
    for share in (0.0, 0.1, 0.37, 0.5, 0.9, 1.0):
        kept = _sparsity.share_out(blocks, share)
        total = sum(s.numel() for row in scores for s in row)
        nnz = [[kept[b][str(i)]["nnz"] for i in range(len(row))] for b, row in enumerate(scores)]
        assert sum(map(sum, nnz)) == total - _masks.zeros(share, total)
        assert all(0 <= k <= s.numel() for row, counts in zip(scores, nnz, strict=True) for k, s in zip(counts, row, strict=True))


# -- SparseGPT's identities (specification T1 to T5) -----------------------------------------------------------------------


def test_a_diagonal_hessian_gives_wandas_mask_and_changes_nothing() -> None:
    W, h = randn(24, 32), randn(32, seed=5).square() + 0.1
    for damp in (0.0, 0.01):
        factor = _solvers.factorize(torch.diag(h), damp)
        done = _sparse_solver.sparsify(W, factor, nm=(2, 4))
        want = _masks.keep_n_of_m(W.abs() * (h + damp * h.mean()).sqrt(), 2, 4)
        assert torch.equal(done.mask, want)
        assert torch.allclose(done.W, W * want, atol=1e-6)


def test_a_constant_hessian_gives_magnitudes_mask() -> None:
    W = randn(24, 32)
    done = _sparse_solver.sparsify(W, _solvers.factorize(3.0 * torch.eye(32), 0.01), nm=(2, 4))
    assert torch.equal(done.mask, _masks.keep_n_of_m(W.abs(), 2, 4))


@pytest.mark.parametrize(("nm", "scope"), [(None, "matrix"), (None, "row"), ((2, 4), "matrix"), ((1, 4), "matrix")])
def test_the_loss_is_that_of_the_damped_hessian(nm: tuple[int, int] | None, scope: str) -> None:
    W, H = randn(40, 160, dtype=torch.float64), hessian(160)
    done = _sparse_solver.sparsify(W, _solvers.factorize(H.clone(), 0.01), share=0.5, nm=nm, scope=scope)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    D = done.W - W
    assert done.loss == pytest.approx(float(0.5 * ((D @ damped) * D).sum()), rel=1e-9)
    assert torch.equal(done.W != 0, done.mask)
    if scope == "row":
        assert ((~done.mask).sum(1) == 80).all()
    assert int((~done.mask).sum()) == 40 * 160 * (1 - (nm[0] / nm[1] if nm else 0.5))
    wanda = _masks.keep_n_of_m(W.abs() * H.diagonal().sqrt(), 2, 4)
    if nm == (2, 4):
        plain = W * wanda - W
        assert done.loss < float(0.5 * ((plain @ damped) * plain).sum())


def test_the_factor_holds_the_inverses_of_the_trailing_hessians() -> None:
    H = hessian(24)
    U = _solvers.factorize(H.clone(), 0.0).U
    for j in (0, 7, 23):
        assert float(U[j, j] ** 2) == pytest.approx(float(torch.linalg.inv(H[j:, j:])[0, 0]), rel=1e-8)


def test_a_given_mask_is_compensated_and_kept() -> None:
    W, H = randn(16, 64, dtype=torch.float64), hessian(64)
    mask = _masks.keep_n_of_m(W.abs(), 2, 4)
    done = _sparse_solver.sparsify(W, _solvers.factorize(H.clone(), 0.0), mask=mask)
    assert torch.equal(done.mask, mask)
    assert torch.equal(done.W != 0, mask)
    D, plain = done.W - W, W * mask - W
    assert float(((D @ H) * D).sum()) < float(((plain @ H) * plain).sum())


@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_refitted_values_are_the_least_squares_of_their_mask(nm: tuple[int, int] | None) -> None:
    W, H = randn(12, 64, dtype=torch.float64), hessian(64)
    factor = _solvers.factorize(H.clone(), 0.01)
    before = _sparse_solver.sparsify(W, factor, nm=nm)
    H = _sparse_solver.damped(H, factor)
    after = _sparse_solver.refit(W, before, H, 200)
    assert torch.equal(after.mask, before.mask)
    for row, (w, kept) in enumerate(zip(W, before.mask, strict=True)):
        want = torch.linalg.solve(H[kept][:, kept], H[kept] @ w)
        assert torch.allclose(after.W[row, kept], want, rtol=1e-6, atol=1e-8)
    D = after.W - W
    assert after.loss == pytest.approx(float(0.5 * ((D @ H) * D).sum()), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 20, 3000])
def test_refitting_raises_no_rows_loss(steps: int) -> None:
    W, H = randn(12, 64), hessian(64).float()
    H[5] = H[:, 5] = 0.0
    factor = _solvers.factorize(H.clone(), 0.01)
    W = W.masked_fill(factor.dead, 0.0)
    W[3] = 0.0
    before = _sparse_solver.sparsify(W, factor)
    H = _sparse_solver.damped(H, factor)
    after = _sparse_solver.refit(W, before, H, steps)
    was, now = (((p.W - W) @ H).mul(p.W - W).sum(1, dtype=torch.float64) for p in (before, after))
    assert (now <= was).all()
    assert after.loss < before.loss
    assert torch.isfinite(after.W).all()
    assert not after.W[~before.mask].any()


def test_refitting_is_the_default_but_before_recovery() -> None:
    asked: list[dict[str, Any]] = [{}, {"recover": 1}, {"quality": True}, {"recover": 1, "refit": 5}]
    assert [sparsegpt.Config(**options).refit for options in asked] == [20, 0, 0, 5]
    with pytest.raises(CompressError, match="--refit -1 is not a number of steps"):
        sparsegpt.Config(refit=-1)


def test_nowag_is_wanda_with_normalised_columns() -> None:
    W, h = randn(20, 32), randn(32, seed=9).square()
    n = _masks.normalise(W)
    assert torch.allclose(n.r2.unsqueeze(1) * n.W * n.r1, W, rtol=1e-5, atol=1e-6)
    assert torch.equal(_masks.keep_n_of_m(n.W.square() * h, 2, 4), _masks.keep_n_of_m(W.abs() * h.sqrt() / n.r1, 2, 4))


# -- artifacts -------------------------------------------------------------------------------------------------------------

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
SMALL = {"nsamples": 6, "seqlen": 16, "batch_size": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def logits(folder: Path) -> torch.Tensor:
    model = compress.load(folder, device="cpu", exact=True, dtype="float32")
    with torch.no_grad():
        return model(torch.arange(24).view(1, 24)).logits


IDS = json.dumps([list(range(24))])
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("magnitude", {}), ("magnitude", {"scope": "model"}), ("magnitude", {"scope": "row", "sparsity": 0.3}),
    ("wanda", {}), ("wanda", {"pattern": "4:8", "sequential": True}), ("wanda", {"scope": "model", "propagate": False}),
    ("nowag", {"pattern": "2:4"}), ("nowag", {"sparsity": 0.7}), ("sparsegpt", {}), ("sparsegpt", {"pattern": "1:4"}),
    ("sparsegpt", {"pattern": "2:4", "recover": 2}), ("magnitude", {"recover": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_artifacts_are_exact_verified_and_equal_to_their_dense_form(
    method: str, options: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    source = pico("llama", torch.bfloat16)
    report = compress.prune(source, method, tmp_path / "sparse", dataset=text, **SMALL, **options)
    compress.prune(source, method, tmp_path / "dense", dataset=text, format="dense", **SMALL, **options)
    known = manifest.read(tmp_path / "sparse")
    sparse, dense = CheckpointReader(tmp_path / "sparse"), CheckpointReader(tmp_path / "dense")
    share = options.get("sparsity", 0.5)
    zeros = total = 0
    for name, entry in known["linears"].items():
        W = dense.read(f"{name}.weight")
        zeros, total = zeros + int((W == 0).sum()), total + W.numel()
        if "pattern" in options:
            n, m = (int(v) for v in options["pattern"].split(":"))
            share = 1 - n / m
            assert ((W.view(-1, m) != 0).sum(1) <= n).all()
        elif options.get("scope", "row" if method == "wanda" else "matrix") == "row":
            assert ((W == 0).sum(1) == _masks.zeros(share, W.shape[1])).all()
        elif options.get("scope") != "model":
            assert int((W == 0).sum()) == _masks.zeros(share, W.numel())
        assert not (torch.signbit(W) & (W == 0)).any()
        kept = np.packbits((W != 0).numpy(), bitorder="little").tobytes()
        assert entry["mask_sha256"] == hashlib.sha256(kept).hexdigest()
    if options.get("scope") == "model":
        assert zeros == _masks.zeros(share, total)
    assert report.zeros == pytest.approx(zeros / total, abs=1e-5)
    assert report.bits_per_weight < 16 * (1 - share) + (1.6 if "pattern" in options else 2.2)
    assert sparse.names != dense.names
    assert torch.equal(logits(tmp_path / "sparse"), logits(tmp_path / "dense"))
    assert cli("verify", tmp_path / "sparse", "--deep", "--source", source).code == 0
    shown = cli("inspect", tmp_path / "sparse").out
    assert "zeros" in shown
    assert cli("inspect", tmp_path / "dense").code == 0


def test_a_dense_form_loads_stock_and_a_sparse_one_is_refused(pico: Callable[..., Path], tmp_path: Path) -> None:
    source = pico("llama", torch.bfloat16)
    for form in ("sparse", "dense"):
        compress.prune(source, "magnitude", tmp_path / form, pattern="2:4", format=form)
    done = python(STOCK_LOGITS, tmp_path / "dense", tmp_path / "logits.pt", IDS)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(tmp_path / "sparse"))
    for pattern, kind in (("2:4", "sparse24"), ("", "bitmask")):
        compress.prune(source, "magnitude", tmp_path / kind, pattern=pattern)
        refused = python(STOCK_LOGITS, tmp_path / kind, tmp_path / "no.pt", IDS)
        assert refused.returncode != 0, kind
        assert not (tmp_path / "no.pt").exists()


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "phi3", "opt"])
def test_other_families(family: str, pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    for pattern in ("2:4", ""):
        out = tmp_path / f"out{pattern[:1]}"
        compress.prune(pico(family, torch.bfloat16), "sparsegpt", out, pattern=pattern, dataset=text, **SMALL)
        compress.prune(pico(family, torch.bfloat16), "sparsegpt", tmp_path / "dense", pattern=pattern, dataset=text, format="dense",
                       resume=False, **SMALL)  # fmt: skip
        assert torch.equal(logits(out), logits(tmp_path / "dense"))


def test_register_loads_sparse_artifacts(pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("COMPRESS_BACKEND", "dense")  # the C++ kernels add in another order
    compress.register()
    for pattern in ("2:4", ""):
        compress.prune(pico("llama", torch.bfloat16), "magnitude", tmp_path / f"a{pattern[:1]}", pattern=pattern)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"a{pattern[:1]}", dtype=torch.float32)
        with torch.no_grad():
            found = model(torch.arange(24).view(1, 24)).logits
        assert torch.equal(found, logits(tmp_path / f"a{pattern[:1]}"))


# -- sparse, then quantized ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "gwq"])
@pytest.mark.parametrize("pattern", ["2:4", ""])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_through_quantization(
    method: str, pattern: str, symmetric: bool, pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:  # fmt: skip
    source = pico("llama", torch.bfloat16)
    compress.prune(source, "sparsegpt", tmp_path / "pruned", pattern=pattern, dataset=text, **SMALL)
    extra = {"quality": True, "samples": 2} if method == "gwq" else {}
    options = {"bits": 4, "group_size": 32, "symmetric": symmetric, "dataset": text, **SMALL, **extra}
    compress.quantize(tmp_path / "pruned", method, tmp_path / "out", **options)
    known, before = manifest.read(tmp_path / "out"), manifest.read(tmp_path / "pruned")
    kinds = {entry["kind"] for entry in known["linears"].values()}
    assert kinds == {"int_grouped_outliers" if method == "gwq" else "sparse24_int" if pattern else "int_grouped"}
    assert known["source"]["pruned"]["method"] == "sparsegpt"
    for name, entry in known["linears"].items():
        assert entry["mask_sha256"] == before["linears"][name]["mask_sha256"]
        assert entry["density"] <= before["linears"][name]["density"]
    assert torch.isfinite(logits(tmp_path / "out")).all()
    assert cli("verify", tmp_path / "out", "--deep", "--source", tmp_path / "pruned").code == 0
    stored = compress.load(tmp_path / "out", device="cpu", dtype="float32")
    pruned = compress.load(tmp_path / "pruned", device="cpu", dtype="float32")
    for name in known["linears"]:
        W = stored.get_submodule(name).dense_weight()
        assert not W[pruned.get_submodule(name).dense_weight() == 0].any()


def test_then_bits_is_prune_and_quantize(
    pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    source, common = pico("llama", torch.bfloat16), {"dataset": text, **SMALL}
    flags = ["--dataset", text, "--nsamples", 6, "--seqlen", 16, "--batch-size", 2]
    job = ["prune", source, "-m", "wanda", "--pattern", "2:4", "--then-bits", 4, "--then-group-size", 32, *flags]
    done = cli(*job, "-o", tmp_path / "both")
    assert done.code == 0, done.err
    compress.prune(source, "wanda", tmp_path / "one", pattern="2:4", **common)
    compress.quantize(tmp_path / "one", "gptq", tmp_path / "two", bits=4, group_size=32, **common)
    assert tree(tmp_path / "both") == tree(tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both", "one", "two"]
    again = cli(*job, "-o", tmp_path / "both")
    assert again.code == 0, again.err
    assert tree(tmp_path / "both") == tree(tmp_path / "two")


def test_a_pruned_checkpoint_of_others_keeps_its_zeros_where_asked(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    compress.prune(pico("llama", torch.bfloat16), "magnitude", tmp_path / "dense", format="dense")
    (tmp_path / "dense" / "manifest.json").unlink()
    for keep in (False, True):
        out = tmp_path / f"out-{keep}"
        compress.quantize(tmp_path / "dense", "gptq", out, group_size=32, dataset=text, keep_zeros=keep, **SMALL)
        facts = manifest.read(out)["linears"].values()
        assert all(("mask_sha256" in entry) == keep for entry in facts)


# -- faults ----------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "options"),
    [("sparsegpt", {"pattern": "2:4", "recover": 1}), ("wanda", {"scope": "model"}), ("magnitude", {"scope": "model"})],
    ids=["sparsegpt-recover", "wanda-model", "magnitude-model"],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    method: str, options: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, common = pico("llama", torch.bfloat16), {"dataset": text, **SMALL, **options}
    compress.prune(source, method, tmp_path / "whole", **common)
    calls = 0
    for stop_at in range(1, 8):
        calls = 0

        def interrupt(_: Any, stop_at: int = stop_at) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Stop

        out = tmp_path / f"out{stop_at}"
        try:
            compress.prune(source, method, out, progress=interrupt, **common)
        except Stop:
            assert not out.exists()
            assert compress.prune(source, method, out, **common).resumed
        assert tree(out) == tree(tmp_path / "whole"), stop_at
    assert calls < 7, "every step was interrupted once"


@pytest.mark.parametrize(
    ("args", "why", "code"),
    [
        (["-m", "wanda", "--pattern", "3:7"], "cannot be split into groups of 7", 2),
        (["-m", "wanda", "--pattern", "4:2"], "is not N:M", 2),
        (["-m", "wanda", "--pattern", "2:4", "--sparsity", "0.5"], "--pattern has a sparsity of its own", 2),
        (["-m", "wanda", "--sparsity", "1.5"], "not in 0..1", 2),
        (["-m", "wanda", "--sparsity", "nan"], "not in 0..1", 2),
        (["-m", "wanda", "--scope", "rows"], "--scope 'rows' is unknown", 2),
        (["-m", "wanda", "--scope", "model", "--pattern", "2:4"], "--scope model chooses counts", 2),
        (["-m", "sparsegpt", "--scope", "model"], "--scope model compares linears by the loss", 2),
        (["-m", "sparsegpt", "--no-propagate"], "--sequential needs pruned blocks", 2),
        (["-m", "nowag", "--recover", "2"], "--recover trains behind pruned blocks", 2),
        (["-m", "gptq"], "gptq is a method of compress quantize", 2),
        (["-m", "wandda"], "unknown method", 2),
        (["-m", "magnitude", "--format", "awq"], "--format 'awq' is unknown to prune", 2),
        (["-m", "magnitude", "--sparsity", "0.99", "--of-model"], "of its linears", 2),
        (["-m", "magnitude", "--domain-dataset", "x.txt"], "means nothing to magnitude", 2),
    ],
)
def test_bad_options(
    args: list[str], why: str, code: int, pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("prune", pico("llama"), *args, "-o", tmp_path / "out", "--nsamples", 2, "--seqlen", 8)
    assert done.code == code, done.err
    assert why in done.err
    assert "hint:" in done.err
    assert not (tmp_path / "out").exists()


def test_pruned_artifacts_are_not_rotated_and_quantized_ones_not_pruned(
    pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    compress.prune(pico("llama", torch.bfloat16), "magnitude", tmp_path / "pruned")
    done = cli("quantize", tmp_path / "pruned", "-m", "rsq", "-o", tmp_path / "out", "--group-size", 32)
    assert (done.code, "use --no-rotate" in done.err) == (2, True), done.err
    compress.quantize(pico("llama", torch.bfloat16), "rtn", tmp_path / "rtn", group_size=32)
    done = cli("prune", tmp_path / "rtn", "-m", "magnitude", "-o", tmp_path / "out")
    assert (done.code, "already compressed" in done.err) == (1, True), done.err


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "nowag"])
def test_no_zeros_and_nothing_but_zeros(method: str, share: float, pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = pico("llama", torch.bfloat16)
    report = compress.prune(source, method, tmp_path / "out", sparsity=share, dataset=text, **SMALL)
    assert report.zeros == pytest.approx(share, abs=1e-4)
    assert torch.isfinite(logits(tmp_path / "out")).all()
    if share == 0.0:
        assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_a_share_of_the_model_is_counted_over_all_its_weights(pico: Callable[..., Path], tmp_path: Path) -> None:
    source = pico("llama", torch.bfloat16)
    report = compress.prune(source, "magnitude", tmp_path / "out", sparsity=0.3, of_model=True)
    assert report.zeros_model == pytest.approx(0.3, abs=1e-3)
    assert report.zeros is not None
    assert report.zeros > 0.3


def test_a_damaged_mask_is_named(pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    from safetensors.torch import load_file, save_file

    compress.prune(pico("llama", torch.bfloat16), "magnitude", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = next(n for n in tensors if n.endswith(".row_offsets"))
    tensors[name][3] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"damaged|row_offsets"):
        compress.load(tmp_path / "out", device="cpu")
    assert cli("quantize", tmp_path / "out", "-m", "rtn", "-o", tmp_path / "q", "--group-size", 32).code == 1


def test_in_recovery_parts_move_by_steps_of_their_own_or_not_at_all() -> None:
    from compress.pipeline.recover import Recovery
    from compress.pipeline.states import Store
    from compress.types import Trainable

    W, inputs, targets = randn(6, 8), Store(None), Store(None)
    for seed in range(3):
        inputs.append(randn(1, 20, 8, seed=seed))
        targets.append(inputs[seed] @ W.T)
    moved = []
    for steps in ({}, {"a": 0.1}, {"a": 0.0}):
        parts = {"a": randn(6, 8, seed=7), "b": randn(6, 8, seed=8)}
        one = Trainable(parts, lambda p: p["a"] + p["b"], lambda p: p["a"], steps)  # type: ignore[arg-type, return-value]
        found, losses = Recovery(lambda w, x: x @ w["fc"].T, inputs, targets, "cpu").train({"fc": one}, 3, 0.02, 0)
        assert losses["after"] < losses["before"]
        assert not torch.equal(found["fc"]["b"], parts["b"])
        moved.append(float((found["fc"]["a"] - parts["a"]).norm()))
    assert moved[0] > 5 * moved[1] > 0 == moved[2]


# -- ARMOR -----------------------------------------------------------------------------------------------------------------

ARMOR: list[dict[str, Any]] = [
    {"pattern": "1:4", "block": 24, "ragged": True, "restarts": 4}, {"mode": "paper", "iters": 20},
    {"quality": True, "recover": 1, "block": 24, "ragged": True, "restarts": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", ARMOR, ids=["fast", "paper", "quality"])
def test_armor_never_ends_above_nowag_and_serves_what_it_stores(
    options: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    source, common = pico("llama", torch.bfloat16), {"dataset": text, **SMALL, "block": 32, **options}
    report = compress.prune(source, "armor", tmp_path / "out", **common)
    known = manifest.read(tmp_path / "out")
    rows = [row for part in known["search"] for row in part["armor"]]
    assert len(rows) == len(known["linears"]) == report.linears
    assert all(row["L"] <= row["L0"] for row in rows)
    assert sum(row["ratio"] for row in rows) / len(rows) < 0.95
    n, m = (int(v) for v in options.get("pattern", "2:4").split(":"))
    assert {entry["density"] for entry in known["linears"].values()} <= {n / m}
    assert cli("verify", tmp_path / "out", "--deep", "--source", source).code == 0
    model = compress.load(tmp_path / "out", device="cpu", exact=True, dtype="float32")
    dense = compress.load(source, device="cpu", dtype="float32")
    for name in known["linears"]:
        place = dense.get_submodule(name)
        place.weight.data.copy_(model.get_submodule(name).dense_weight())
    with torch.no_grad():
        ids = torch.arange(24).view(1, 24)
        assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert python(STOCK_LOGITS, tmp_path / "out", tmp_path / "no.pt", IDS).returncode != 0


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_armors_core_is_quantized_between_its_wrappers(
    method: str, symmetric: bool, pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    armor = {"mode": "paper", "iters": 5, "block": 24 if symmetric else 16, "ragged": symmetric, "dataset": text, **SMALL}
    compress.prune(pico("llama", torch.bfloat16), "armor", tmp_path / "armor", **armor)
    options = {"bits": 8, "group_size": 32, "symmetric": symmetric, "dataset": text, **SMALL}
    report = compress.quantize(tmp_path / "armor", method, tmp_path / "out", **options)
    known, before = manifest.read(tmp_path / "out"), manifest.read(tmp_path / "armor")
    assert {(e["kind"], e["params"]["core"]) for e in known["linears"].values()} == {("armor", "sparse24_int")}
    assert report.bits_per_weight < 0.78 * sum(e["bits"] for e in before["linears"].values()) / len(before["linears"])
    a, b = (compress.load(tmp_path / f, device="cpu", exact=True, dtype="float32") for f in ("armor", "out"))
    for name in known["linears"]:
        W, W_hat = (m.get_submodule(name).dense_weight() for m in (a, b))
        assert float((W_hat - W).norm() / W.norm()) < 0.03
        assert torch.equal(a.get_submodule(name).pre, b.get_submodule(name).pre)
    assert cli("verify", tmp_path / "out", "--deep", "--source", tmp_path / "armor").code == 0
    for wrong in (["-m", "awq"], ["-m", "gwq"], ["-m", method, "--format", "dense"], ["-m", method, "--target-bpw", "5"]):
        done = cli("quantize", tmp_path / "armor", *wrong, "--group-size", 32, "-o", tmp_path / "no")
        assert done.code == 2, done.err
        assert "hint:" in done.err
    assert cli("prune", tmp_path / "armor", "-m", "magnitude", "-o", tmp_path / "no").code == 2


def test_the_cores_hessian_is_that_of_its_inputs() -> None:
    from compress.methods._second_order import seen_by_core

    x, pre = randn(50, 24, dtype=torch.float64), randn(3, 8, 8, seed=2, dtype=torch.float64)
    seen = torch.einsum("kbc,tkc->tkb", pre, x.view(50, 3, 8)).reshape(50, 24)
    assert torch.allclose(seen_by_core(x.T @ x, pre), seen.T @ seen)
    pre[2] = torch.eye(8)
    pre[2, :4, :4] = randn(4, 4, seed=3, dtype=torch.float64)  # the last block has 4 inputs
    assert torch.allclose(seen_by_core(x[:, :20].T @ x[:, :20], pre), seen_by_core(x.T @ x, pre)[:20, :20])

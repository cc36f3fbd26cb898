"""Factorizing a checkpoint: the kind's bytes and products, the methods, the model's budget, artifacts that load and resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_kernels import lowrank_sparse as kernel
from compress_kernels.lowrank_sparse import reference
from conftest import CALIBRATION, EXAMPLE, STOCK_LOGITS, VALID, Outcome, python, tree

import compress
from compress.checkpoint import manifest
from compress.checkpoint.reader import CheckpointReader
from compress.formats import lowrank_sparse
from compress.methods import lost
from compress.types import Packed

SMALL = {"nsamples": 4, "seqlen": 32}
IDS = json.dumps([list(range(24))])
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def logits(folder: Path) -> torch.Tensor:
    model = compress.load(folder, dtype=torch.float32, exact=True)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(24).view(1, 24)).logits
    return found


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(O: int, I: int, rank: int, s: int, dtype: torch.dtype = torch.float16, compact: bool = True) -> Packed:
    """A packed weight of random factors."""
    columns = torch.randperm(I, generator=torch.Generator().manual_seed(O + s))[:s].sort().values
    B, W_s = randn(O, rank).to(dtype), randn(O, s, seed=1).to(dtype)
    A = randn(rank, I - s if compact else I, seed=2).to(dtype)
    return lowrank_sparse.pack(B, A, columns, W_s, I)


def coded(O: int, I: int, rank: int, s: int, bits: int = 4, group: int = 8) -> Packed:
    """The same with quantized factors."""
    columns = torch.randperm(I, generator=torch.Generator().manual_seed(O + s))[:s].sort().values
    parts = []
    for rows, length, seed in ((rank, I - s, 3), (O, rank + s, 4)):
        whole = reference.padded(length, group)
        q = torch.randint(0, 1 << bits, (rows, whole), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        q[:, length:] = 1 << (bits - 1)
        parts.append((q, (randn(rows, whole // group, seed=seed).abs() + 0.1).half()))
    return lowrank_sparse.pack_codes(parts[0] if rank else None, parts[1], columns, I, bits=bits, group=group, rank=rank)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


CASES = [(24, 40, 5, 6), (24, 40, 0, 6), (24, 40, 7, 0), (24, 40, 0, 40), (17, 33, 3, 1), (40, 24, 24, 5), (8, 9, 1, 8)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_packed_comes_back_and_takes_the_bytes_that_it_should(case: tuple[int, int, int, int]) -> None:
    O, I, rank, s = case
    for packed, compact in ((made(*case), True), (made(*case, compact=False), s == 0)):
        B, A, columns, W_s = lowrank_sparse.unpack(packed)
        again = lowrank_sparse.pack(B, A, columns, W_s, I)
        assert again.params == packed.params
        assert all(torch.equal(again.tensors[n], t) for n, t in packed.tensors.items())
        spec = lowrank_sparse.spec(packed.params, packed.shape, "F32")
        assert {n: shape for n, (_, shape) in spec.items()} == {n: tuple(t.shape) for n, t in packed.tensors.items()}
        values = rank * (O + I - (s if compact else 0)) + s * O
        assert sum(t.numel() * t.element_size() for t in packed.tensors.values()) == 2 * values + 2 * s
        assert lowrank_sparse.parameters(packed.params, packed.shape) == values
        assert lowrank_sparse.complete({k: v for k, v in packed.params.items() if k == "compact"}, spec) == packed.params
        W = torch.zeros(O, I)
        J = [j for j in range(I) if j not in columns.tolist()]
        if A.shape[1] == I:
            W += B.float() @ A.float()
        else:
            W[:, J] = B.float() @ A.float()
        W[:, columns] += W_s.float()
        assert torch.allclose(lowrank_sparse.dequantize(packed), W, rtol=1e-6, atol=1e-5)
    wide = lowrank_sparse.spec({"rank": 1, "columns": 2}, (4, 70000), "BF16")
    assert wide["columns"] == ("I32", (2,))
    assert wide["A"] == ("BF16", (1, 69998))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_reference_and_the_dense_product(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    O, I, _, _ = case
    for packed in (made(*case), made(*case, compact=False), coded(*case), coded(*case, bits=8)):
        for x in (randn(I, seed=5), randn(3, I, seed=6), randn(2, 4, 2 * I, seed=7)[..., ::2]):
            bias = randn(O, seed=8).to(dtype)
            args = packed.tensors, packed.params, packed.shape
            y = kernel.linear(x.to(dtype), kernel.prepare(*args, dtype, exact=True), bias)
            assert y.shape == (*x.shape[:-1], O)
            want = reference.linear(x.to(dtype), *args, bias)
            assert distance(y, want) < (1e-6 if dtype == torch.float32 else 1e-2)  # sums in another order
            if dtype == torch.float32:
                product = x.double() @ lowrank_sparse.dequantize(packed).double().T + bias.double()
                assert distance(y, product) < 1e-5


def digest(packed: Packed) -> dict[str, str]:
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for name, t in packed.tensors.items()}


def test_the_bytes_are_frozen() -> None:
    steps = torch.arange(0, 480, dtype=torch.float32)
    B, A, W_s = steps[:12].view(6, 2).half() / 8, steps[:14].view(2, 7).half() / 16 - 0.25, steps[:18].view(6, 3).half()
    packed = lowrank_sparse.pack(B, A, torch.tensor([1, 4, 9]), W_s, 10)
    assert packed.tensors["columns"].to(torch.int32).tolist() == [1, 4, 9]
    assert digest(packed) == GOLDEN["plain"]
    q = torch.arange(0, 16, dtype=torch.uint8)
    U = (q.repeat(6, 1)[:, :8].contiguous(), torch.full((6, 2), 0.5).half())
    left = (q.repeat(2, 1)[:, :8].contiguous(), torch.full((2, 2), 0.25).half())
    assert digest(lowrank_sparse.pack_codes(left, U, torch.tensor([1, 4, 9]), 10, bits=4, group=4, rank=2)) == GOLDEN["codes"]


GOLDEN = {
    "plain": {
        "columns": "5f2dcc234c87578e",
        "B": "fa4b1402c9de3205",
        "A": "6fd44ff5cd1396d2",
        "W_s": "ca7d18175b97cc97",
    },
    "codes": {
        "columns": "5f2dcc234c87578e",
        "A_packed": "141b90898887d0d4",
        "A_scale": "23cac2275bc00f01",
        "U_packed": "de477f2eba1fcb6d",
        "U_scale": "ebfb8c46b5af4dff",
    },
}


def test_damaged_tensors_are_refused() -> None:
    for change, why in (
        ({"columns": torch.tensor([1, 1], dtype=torch.uint16)}, "ascending"),
        ({"columns": torch.tensor([1, 40], dtype=torch.uint16)}, "ascending"),
        ({"A": torch.full((3, 38), float("nan")).half()}, "NaN"),
        ({"B": torch.zeros(24, 4).half()}, "wanted"),
    ):
        packed = made(24, 40, 3, 2)
        with pytest.raises(ValueError, match=why):
            kernel.prepare({**packed.tensors, **change}, packed.params, packed.shape, torch.float32)
    for params in ({"rank": 0, "columns": 0}, {"rank": 30, "columns": 0}, {"rank": 1, "columns": 41}):
        with pytest.raises(compress.CompressError):
            lowrank_sparse.spec(params, (24, 40), "F16")


def test_training_changes_values_and_never_the_columns() -> None:
    kinds = made(12, 20, 4, 3), made(12, 20, 4, 3, compact=False), coded(12, 20, 4, 3), made(12, 20, 0, 3), made(12, 20, 4, 0)
    kinds = (*kinds, coded(12, 20, 0, 3))
    for packed in kinds:
        one = lowrank_sparse.trainable(packed)
        assert torch.allclose(one.weight(one.parts), lowrank_sparse.dequantize(packed), atol=1e-6)
        same = one.rebuild(one.parts)
        assert all(torch.equal(same.tensors[n], t) for n, t in packed.tensors.items())
        parts = {n: t.clone().requires_grad_() for n, t in one.parts.items()}
        optimiser = torch.optim.Adam(list(parts.values()), lr=0.05)
        target, losses = randn(12, 20, seed=9), []
        for _ in range(20):
            loss = (one.weight(parts) - target).square().mean()
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert losses[-1] < losses[0]
        after = one.rebuild({n: t.detach() for n, t in parts.items()})
        assert after.params == packed.params
        if "columns" in packed.tensors:
            assert torch.equal(after.tensors["columns"], packed.tensors["columns"])
        assert torch.allclose(lowrank_sparse.dequantize(after), one.weight(parts).detach(), atol=2e-2)


# -- artifacts -------------------------------------------------------------------------------------------------------------

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("svd", {}), ("asvd", {}), ("svdllm", {}), ("svdllm", {"update": True}), ("lost", {"importance": "relative"}), ("lost", {}),
    ("lost", {"scope": "matrix"}), ("lost", {"weighting": "diagonal", "compact": False}), ("lost", {"weighting": "none"}),
    ("lost", {"weighting": "none", "selector": "lost", "refit": False, "columns": 0.1, "scope": "matrix"}),
    ("lost", {"then_bits": 4, "then_group_size": 16}), ("lost", {"recover": 1}), ("svd", {"recover": 1, "then_bits": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_methods_make_artifacts_that_load_and_verify(
    method: str, options: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    source, out = pico("llama", torch.bfloat16), tmp_path / "out"
    fine = {"rank_multiple": 4} if method == "lost" else {}
    report = compress.factorize(source, method, out, keep=0.7, dataset=text, **fine, **SMALL, **options)
    known = manifest.read(out)
    values = weights = 0
    for name, entry in known["linears"].items():
        shape = tuple(entry["shape"])
        spent = lowrank_sparse.parameters(entry["params"], shape)
        values, weights = values + spent, weights + shape[0] * shape[1]
        if options.get("scope", "model" if method == "lost" else "matrix") == "matrix":
            assert 0.6 * shape[0] * shape[1] < spent <= 0.7 * shape[0] * shape[1], name
    assert report.kept == values / weights
    assert 0.65 < report.kept <= 0.7
    if "then_bits" not in options:
        assert report.bits_per_weight == pytest.approx(16 * report.kept, rel=0.02)
    elif options["then_bits"] == 4:
        assert report.bits_per_weight < 6 * report.kept
    assert cli("verify", out, "--deep", "--source", source).code == 0
    shown = cli("inspect", out)
    assert shown.code == 0
    assert "of the linears' parameters" in shown.out
    found, dense = logits(out), logits(source)
    assert 0 < float((found - dense).norm() / dense.norm()) < 1.2


def test_a_dense_form_loads_stock_and_factors_are_refused(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = pico("llama")
    for form in ("factors", "dense"):
        compress.factorize(source, "lost", tmp_path / form, keep=0.7, rank_multiple=4, format=form, dataset=text, **SMALL)
    done = python(STOCK_LOGITS, tmp_path / "dense", tmp_path / "logits.pt", IDS)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(tmp_path / "dense"))
    assert torch.allclose(logits(tmp_path / "factors"), logits(tmp_path / "dense"), atol=1e-3)  # sums in another order
    refused = python(STOCK_LOGITS, tmp_path / "factors", tmp_path / "no.pt", IDS)
    assert refused.returncode != 0
    assert not (tmp_path / "no.pt").exists()


def test_register_loads_factors(pico: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress.register()
    compress.factorize(pico("llama", torch.bfloat16), "svd", tmp_path / "out", keep=0.7)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.arange(24).view(1, 24)).logits
    assert torch.equal(found, logits(tmp_path / "out"))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3", "opt"])
def test_other_families(family: str, pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    common = {"keep": 0.7, "rank_multiple": 8, "selector": "weight", "dataset": text, "importance": "relative", **SMALL}
    source = pico(family)
    compress.factorize(source, "lost", tmp_path / "out", **common)
    compress.factorize(source, "lost", tmp_path / "dense", format="dense", **common)
    found = logits(tmp_path / "out")
    assert torch.allclose(found, logits(tmp_path / "dense"), atol=2e-3 * float(found.abs().max()))


def test_factors_are_read_as_the_weights_that_they_make(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """A factorized artifact quantizes like any checkpoint, its product being the weight."""
    compress.factorize(pico("llama"), "svd", tmp_path / "factors", keep=0.7)
    compress.factorize(pico("llama"), "svd", tmp_path / "dense", keep=0.7, format="dense")
    for name in ("factors", "dense"):
        compress.quantize(tmp_path / name, "rtn", tmp_path / f"{name}4", bits=8, group_size=32)
    assert torch.allclose(logits(tmp_path / "factors4"), logits(tmp_path / "dense4"), atol=2e-2)


class Stop(Exception):
    """The run is killed here."""


@pytest.mark.parametrize("options", [{}, {"recover": 1, "scope": "matrix", "then_bits": 8}], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    options: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    quick = {"keep": 0.7, "rank_multiple": 16, "selector": "diag", "dataset": text, **SMALL}
    source, common = pico("llama", torch.bfloat16), {**quick, **options}
    compress.factorize(source, "lost", tmp_path / "whole", **common)
    calls = 0
    for stop_at in range(1, 9):
        calls = 0

        def interrupt(_: Any, stop_at: int = stop_at) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Stop

        out = tmp_path / f"out{stop_at}"
        try:
            compress.factorize(source, "lost", out, progress=interrupt, **common)
        except Stop:
            assert not out.exists()
            assert compress.factorize(source, "lost", out, **common).resumed
        assert tree(out) == tree(tmp_path / "whole"), stop_at
        if calls < stop_at:
            break
    assert calls < stop_at, "every step was interrupted once"


def test_a_dry_run_knows_the_size(pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    source = pico("llama", torch.bfloat16)
    for method, more, exact in (("svdllm", [], True), ("svd", ["--then-bits", 8], True), ("lost", ["--rank-multiple", 4], False)):
        args = ["factorize", source, "-m", method, "--keep", 0.7, "--nsamples", 4, "--seqlen", 32, *more]
        seen = json.loads(cli(*args, "--dry-run", "--json").out)
        assert seen["exact"] is exact
        assert cli(*args, "--dataset", text, "-o", tmp_path / method).code == 0
        size = sum(p.stat().st_size for p in (tmp_path / method).glob("*.safetensors"))
        assert seen["artifact_bytes"] == size if exact else abs(seen["artifact_bytes"] - size) < 0.05 * size


def test_the_whole_weight_stays_where_nothing_else_serves(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = pico("llama", torch.bfloat16), tmp_path / "out"
    compress.factorize(source, "lost", out, keep=0.97, rank_multiple=4, dataset=text, **SMALL)
    reader, origin = CheckpointReader(out), CheckpointReader(source)
    whole = [n for n, e in manifest.read(out)["linears"].items() if e["params"]["columns"] == e["shape"][1]]
    assert whole
    for name in whole:
        assert torch.equal(reader.read(f"{name}.W_s"), origin.read(f"{name}.weight"))
        assert manifest.read(out)["linears"][name]["error"] == 0


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "how much shall stay?"),
        (["--keep", "1.2"], "is not in 0..1"),
        (["--keep", "0.001"], "no rank"),
        (["--keep", "0.7", "--weighting", "cov"], "--weighting 'cov' is unknown"),
        (["--keep", "0.7", "--columns", "0.1"], "--columns fixes what --scope model chooses"),
        (["--keep", "0.7", "--sequential", "--no-propagate"], "--sequential needs"),
        (["--keep", "0.7", "--then-bits", "5"], "--then-bits 5 is not supported"),
        (["--keep", "0.7", "--no-propagate", "--recover", "2"], "--recover trains"),
        (["--keep", "0.7", "-m", "svd", "--format", "sparse"], "is unknown to factorize"),
        (["--keep", "0.7", "-m", "gptq"], "gptq is a method of compress quantize"),
    ],
)
def test_bad_options(
    args: list[str], why: str, pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("factorize", pico("llama"), *args, "-o", tmp_path / "out", "--nsamples", 2, "--seqlen", 8, "--dataset", text)
    assert done.code in (1, 2), done.err
    assert why in done.err
    assert "hint:" in done.err
    assert not (tmp_path / "out").exists()


def test_a_share_that_no_choice_meets_is_refused() -> None:
    kept = {"tails:x": torch.rand(11, 65).sort(descending=True).values, "facts:x": torch.tensor([64.0, 4096.0, 1.0])}
    config = lost.Config(keep=0.01, rank_multiple=64)
    with pytest.raises(compress.CompressError, match="less than ranks of 64"):
        lost.settle(lambda: iter([kept]), config)
    assert lost.settle(lambda: iter([kept]), lost.Config(keep=0.02, rank_multiple=16))[0]["x"]["columns"] == 64


def test_the_claim_in_miniature(tmp_path: Path) -> None:
    """At 80 % of the parameters: columns solved together with the factors beat whitening, which beats plain SVD."""
    data = {"dataset": CALIBRATION, "nsamples": 8, "seqlen": 128, "keep": 0.8}
    quick = {"scope": "matrix", "columns": 0.5, "selector": "weight", "propagate": False}
    found = {}
    for name, (method, options) in {"svd": ("svd", {}), "svdllm": ("svdllm", {}), "lost": ("lost", quick)}.items():
        compress.factorize(EXAMPLE, method, tmp_path / name, **data, **options)
        found[name] = compress.evaluate(tmp_path / name, text=VALID, windows=4, batch_size=4)["perplexity"].value
    assert found["lost"] < 0.8 * found["svdllm"]
    assert found["svdllm"] < 0.2 * found["svd"]

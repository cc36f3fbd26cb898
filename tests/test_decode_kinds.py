"""Native decoding of kinds whose products are several, and of bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_kernels import armor, block, lost, lowrank_sparse, masked_delta, native
from compress_kernels.masked_delta import single
from conftest import CALIBRATION, EXAMPLE
from test_bundles import tune
from test_decode import Random, counted, greedy, ids_of, masked_weight, steps
from test_decode import linear as plain
from test_native import BF16, F16, F32, isa, randn
from test_native_deltas import deltas, shared
from test_native_factors import coded, factors

import compress
from compress.errors import CompressError

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")
__all__ = ["isa"]

KINDS = ("factors", "lost", "armor", "delta", "coded", "thin", "armor codes", "signs", "columns", "levels", "int8")


def linear(kind: str, O: int, I: int, dtype: torch.dtype, seed: int) -> block.Linear:
    """A random weight of a kind with numbers that keep a model's near 1, and a bias for every other one."""
    bias = randn(O, dtype=dtype, seed=seed) if seed % 2 else None
    stored = F16 if dtype == F16 else BF16
    if kind in ("factors", "coded", "thin", "columns"):
        rank, kept = (0, 24) if kind == "columns" else (min(O, I) // 4 + 1, 0 if kind == "thin" else I // 4)
        if kind == "coded":
            tensors, params = coded(O, I, rank, kept, 4, 32, seed % 4 == 0)
            for name in ("A", "U"):
                tensors[f"{name}_scale"] /= 10
        else:
            tensors, params = factors(O, I, rank, kept, seed % 4 == 0, stored)
            tensors = {n: t if n == "columns" else t / 8 for n, t in tensors.items()}
        found: Any = lowrank_sparse.prepare(tensors, params, (O, I), dtype)
    elif kind == "lost":
        tensors, _ = factors(O, I, 9, 16, False, stored)
        tensors = {n: t if n == "columns" else t / 4 for n, t in tensors.items()}
        params = {"rank": 9, "kept": 16, "gamma": 0.6, "activation": "silu" if seed % 2 else "identity"}
        found = lost.prepare(tensors, params, (O, I), dtype)
    elif kind.startswith("armor"):
        core = masked_weight(O, I, kind == "armor codes", seed)
        core = native.masked.make(core.mask, core.start, core.values, core.scale, core.zero, core.shape, core.group_size)
        b_in, b_out = next(b for b in (16, 8) if I % b == 0), next((b for b in (24, 10, 8) if O % b == 0), O)
        stacks = [randn(n // b, b, b, dtype=dtype, seed=seed) * b**-0.5 for n, b in ((I, b_in), (O, b_out))]
        return block.Linear(armor.cpu.make(stacks[0], stacks[1], core), bias, dtype)
    elif kind in ("delta", "signs", "levels"):
        form = ("bf16", "int4", "int8", "constant")[seed % 4]
        vector = shared(form, O, I, kind == "signs", kind == "levels")
        delta = masked_delta.Delta(deltas(O, I, 1)["t0"].mask, 0.05)
        base = randn(O, I, dtype=dtype, seed=seed) * I**-0.5
        made = block.with_delta(base, bias, vector, delta, kind == "signs", dtype)
        assert isinstance(made, block.Linear), made
        return made
    else:
        return plain(kind, O, I, dtype, seed)
    made = block.lower(found, bias, dtype)
    assert isinstance(made, block.Linear), made
    return made


@pytest.mark.parametrize("turn", range(len(KINDS)))
def test_a_step_agrees_with_its_definition(turn: int, isa: str) -> None:
    dtype = (F32, BF16, F16)[turn % 3]
    for B, slot, first in ((1, 39, [7]), (3, 17, [0, 5, 17])):
        case = Random(dtype, B, turn=turn, every=KINDS, linear=linear, outputs=(37, 50, 48)[turn % 3])
        want = case.definition(slot, first)
        y = case.native(slot, first)
        # what is rounded to 16 bits between products, or to 8, may be so on the other side
        assert (y - want).norm() < (1e-4 if dtype == F32 else 3e-2) * want.norm(), (B, slot)


def test_threads_change_no_bit() -> None:
    for turn in (0, 1, 2):
        case = Random((BF16, F32)[turn % 2], 2, D=256, inner=1312, turn=turn, every=KINDS, linear=linear, outputs=200)
        one = case.native(17, [0, 5])
        try:
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(one, case.native(17, [0, 5]))
        finally:
            torch.set_num_threads(1)


def test_nan_reaches_its_row_alone_and_what_does_not_fit_is_refused() -> None:
    case = Random(F32, 3, every=KINDS, linear=linear)
    case.x[1, 3] = float("nan")
    y = case.native(17, [0, 0, 0])
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    for kind in ("factors", "armor", "delta"):
        case.head = linear(kind, 37 if kind != "armor" else 40, 96, F32, 14)
        with pytest.raises(RuntimeError, match="shape"):
            case.decoder()
    weight = linear("delta", 37, 64, F32, 14).weight
    assert isinstance(weight, single.Weight)
    weight.job.tasks = 2
    case.head = block.Linear(weight, None, F32)
    with pytest.raises(RuntimeError, match="shape"):
        case.decoder()


# -- artifacts ------------------------------------------------------------------------------------------------------------


def check(folder: Path, kind: str, vocab: int = 128) -> None:
    """fp32 logits equal the modules' own, 16-bit ones are as near to them, and greedy tokens are the same."""
    model = compress.load(folder, dtype="float32")
    assert model.decoding.path == "native"
    assert kind in {getattr(m, "kind", "") for m in model.modules()}
    ids = ids_of(2, 20, vocab)
    slow, fast = steps(model, ids, 10, False), steps(model, ids, 10, True)
    assert (slow - fast).abs().max() < 2e-4 * slow.abs().max()
    assert not torch.equal(slow, fast), "the native path did not run"
    half = compress.load(folder, dtype="bfloat16")
    assert half.decoding.path == "native"
    ours, theirs = steps(half, ids, 10, True), steps(half, ids, 10, False)
    assert (ours - slow).norm() <= 1.2 * (theirs - slow).norm(), "further from fp32 than the modules' path"


TEXT: dict[str, Any] = {"nsamples": 2, "seqlen": 32}


def test_armor_artifacts_decode_natively(pico: Callable[..., Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": str(CALIBRATION), "mode": "paper", "iters": 2, **TEXT}
    compress.prune(pico("llama", BF16), "armor", tmp_path / "a", block=16, **options)
    check(tmp_path / "a", "armor")
    compress.prune(pico("llama", BF16), "armor", tmp_path / "b", block=48, ragged=True, **options)
    model = compress.load(tmp_path / "b")
    assert "is armor, and its blocks do not divide its shape" in model.decoding.path
    greedy(model, ids_of(1, 6), True, do_sample=False)


def test_factorized_artifacts_decode_natively(pico: Callable[..., Path], tmp_path: Path) -> None:
    for name, more in {"plain": {}, "coded": {"then_bits": 4, "then_group_size": 32}}.items():
        compress.factorize(pico("qwen3", BF16), "lost", tmp_path / name, dataset=str(CALIBRATION), keep=0.6, **more, **TEXT)
        check(tmp_path / name, "lowrank_sparse")


def test_a_real_factorized_model_decodes_as_its_own_forward_does(tmp_path: Path) -> None:
    compress.factorize(EXAMPLE, "svd", tmp_path / "out", keep=0.7)
    check(tmp_path / "out", "lowrank_sparse", 32000)


def test_trained_layers_decode_natively(pico: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress import training

    start = pico("llama", F32)
    model = AutoModelForCausalLM.from_pretrained(start)
    training.convert(model, 12, 0.1)
    training.save(model, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(start))
    check(tmp_path / "out", "lost")


# -- bundles --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle whose second task has norms and a bias of its own, and its base."""
    base, folder = pico("llama", F16), tmp_path_factory.mktemp("bundle")

    def own(W: dict[str, torch.Tensor]) -> None:
        for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.q_proj.bias"):
            W[name] += 0.25

    tunes = {"a": tune(base, folder / "a", 1, size=0.1), "b": tune(base, folder / "b", 2, own, 0.1)}
    compress.bundle(base, tunes, folder / "out", shared="int4")
    return folder / "out", base


def same(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The native logits, which are the modules'."""
    assert model.decoding.path == "native"
    slow, fast = steps(model, ids, 8, False), steps(model, ids, 8, True)
    assert (slow - fast).abs().max() < 1e-4 * slow.abs().max()
    return fast


def test_a_bundle_decodes_natively_and_a_switch_leaves_no_stale_weights(bundle: tuple[Path, Path]) -> None:
    out, base = bundle
    ids, found = ids_of(2, 16, 120), {}
    for task, model in {
        "one": compress.load(out, task="a", base=base, dtype=F32),
        "all": compress.load(out, base=base, dtype=F32),
    }.items():
        first, second = (same(model.set_task(t), ids) for t in ("a", "b"))
        assert (first - second).norm() > 0.02 * first.norm()
        assert torch.equal(same(model.set_task("a"), ids), first)
        found[task] = first, second
    for dense, mixed in zip(*found.values(), strict=True):
        assert (dense - mixed).norm() < 5e-3 * dense.norm()  # whose weights are rounded to the checkpoint's fp16
    plain = same(model.set_tasks([None]), ids)
    assert (plain - same(compress.load(out, base=base, dtype=F32).set_tasks([None, None]), ids)).norm() == 0
    dtype16 = compress.load(out, base=base, dtype=BF16).set_task("b")
    assert dtype16.decoding.path == "native"
    assert (steps(dtype16, ids, 8, True) - found["all"][1]).norm() < 0.05 * found["all"][1].norm()


def test_a_batch_of_several_tasks_takes_the_models_own_path_and_says_so(bundle: tuple[Path, Path]) -> None:
    model: Any = compress.load(bundle[0], base=bundle[1], dtype=F32)
    assert "no task was chosen" in model.decoding.path
    ids, calls = ids_of(2, 8, 120), counted(model)
    with pytest.raises(CompressError, match="no task"):
        model(ids)
    mixed = greedy(model.set_tasks(["a", "b"]), ids, True, do_sample=False)
    assert "several tasks" in model.decoding.path
    assert calls[0] == 0
    alone = [greedy(model.set_task(t), ids[i : i + 1], True, do_sample=False) for i, t in enumerate("ab")]
    assert calls[0] == 22
    assert torch.equal(mixed, torch.cat(alone))

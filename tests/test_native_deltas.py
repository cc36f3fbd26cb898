"""The C++ kernel of one base and many tasks' masked deltas, against fp64."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from compress_kernels import bits as bitpack
from compress_kernels import masked_delta as kernel
from compress_kernels import native
from compress_kernels.masked_delta import cpu, reference
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")
ISAS = native.ISAS[: native._isa("") + 1] if native.missing() is None else ("scalar",)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 1e-5, BF16: 5e-3, F16: 6e-4}  # of outputs
FORMS = ("bf16", "int8", "int4", "constant")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COMPRESS_ISA", request.param)
    return str(request.param)


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shared(form: str, O: int, I: int, signs: bool, low: bool = False, seed: int = 3, group: int | None = None) -> kernel.Shared:
    second = shared(form, O, I, False, False, seed + 1, group) if low else None
    if form == "bf16":
        return kernel.Shared(randn(O, I, dtype=BF16, seed=seed), low=second)
    if form == "constant":
        return kernel.Shared(torch.tensor([0.37 * seed]), low=second)
    bits = 8 if form == "int8" else 4
    codes = torch.randint(0, 1 << bits, (O, I), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    groups = 1 if form == "int8" or group is None else I // group
    scale = (torch.rand(O, groups, generator=torch.Generator().manual_seed(seed)) / (1 << (bits - 1)) + 0.01).to(BF16)
    words = bitpack.pack(codes, bits)[:, : bitpack.words(I, bits)].contiguous()
    return kernel.Shared(words, scale, bits, 0 if signs else 1 << (bits - 1), second)


def deltas(O: int, I: int, count: int) -> dict[str, kernel.Delta]:
    g = torch.Generator().manual_seed(7)
    planes = [bitpack.pack(torch.rand(O, I, generator=g) < 0.4, 1)[:, : -(-I // 32)].contiguous() for _ in range(count)]
    return {f"t{i}": kernel.Delta(plane, 0.5 + i / 4) for i, plane in enumerate(planes)}


def merged(W0: torch.Tensor, delta: kernel.Delta, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The weight that `extract` writes, in W0's dtype."""
    return (W0.float() + reference.decode(delta, pair, W0.shape[1])).to(W0.dtype)


def in_fp64(
    x: torch.Tensor, W0: torch.Tensor, bias: torch.Tensor | None, v: kernel.Shared, own: dict[str, kernel.Delta], signs: bool,
    tasks: list[str | None],
) -> torch.Tensor:  # fmt: skip
    """Every row with its own dense weight, which is rounded once to x's dtype."""
    I = W0.shape[1]
    pair = reference.values(v, I, signs)
    out = []
    for i, row in enumerate(x.reshape(-1, I)):
        task = tasks[i * len(tasks) // (x.numel() // I)]
        W = merged(W0, own[task], pair) if task in own else W0
        out.append(W.double() @ row.double() + (0 if bias is None else bias.double()))
    return torch.stack(out).view(*x.shape[:-1], -1)


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm().clamp(min=1e-9))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["mask", "signs", "levels"])
def test_one_task_and_many_agree_with_fp64(form: str, mode: str, isa: str) -> None:
    for i, (O, I, group) in enumerate([(48, 256, 64), (37, 201, None), (5, 33, 11), (1, 32, 32), (34, 96, 48)]):
        dtype = (BF16, F32, BF16, F16, BF16)[i]
        v, own = shared(form, O, I, mode == "signs", mode == "levels", group=group), deltas(O, I, 4)
        W0, bias = randn(O, I, dtype=dtype, seed=2), randn(O, dtype=dtype, seed=5) if i % 2 else None
        for M, tasks in ((1, ["t1"]), (3, ["t0", None, "t2"]), (16, ["t3"]), (17, ["t0"]), (64, ["t0", "t1", "t2", "t3"] * 4)):
            x = randn(M, I, dtype=dtype, seed=M)
            assert cpu.can_run(x, W0, bias, v) is None
            y = kernel.linear(x, W0, bias, v, own, mode == "signs", tasks)
            assert y.dtype == dtype
            assert relative(y, in_fp64(x, W0, bias, v, own, mode == "signs", tasks)) < ROUNDING[dtype], (O, I, M, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("mode", ["mask", "signs", "levels"])
def test_a_tasks_weight_is_the_extracted_one_bit_for_bit(dtype: torch.dtype, mode: str, isa: str) -> None:
    for form, (O, I, group) in zip(FORMS, [(37, 96, None), (20, 80, None), (9, 66, 33), (33, 50, None)], strict=True):
        v, own = shared(form, O, I, mode == "signs", mode == "levels", group=group), deltas(O, I, 2)
        W0, pair = randn(O, I, dtype=dtype, seed=2), reference.values(v, I, mode == "signs")
        columns = {t: merged(W0, own[t], pair).T for t in own}
        for M, tasks in ((I, ["t0"]), (2, ["t1"]), (4, ["t1", "t0"]), (6, ["t0"]), (1, ["t1"])):
            y = kernel.linear(torch.eye(I, dtype=dtype)[:M], W0, None, v, own, mode == "signs", tasks)  # an output is one weight
            want = torch.stack([columns[tasks[i * len(tasks) // M]][i] for i in range(M)])
            assert torch.equal(y, want), (form, M)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 80), st.sampled_from(FORMS), st.sampled_from(["mask", "signs", "levels"]),
    st.lists(st.sampled_from(["t0", "t1", "t2", None, "base"]), min_size=1, max_size=9), st.integers(1, 3),
    st.sampled_from([F32, BF16, F16]),
)  # fmt: skip
def test_any_batch_agrees_with_fp64(
    O: int, I: int, form: str, mode: str, tasks: list[str | None], each: int, dtype: torch.dtype
) -> None:
    v, own = shared(form, O, I, mode == "signs", mode == "levels"), deltas(O, I, 3)
    W0, x = randn(O, I, dtype=dtype, seed=2), randn(len(tasks) * each, 2, I, dtype=dtype, seed=len(tasks))
    y = kernel.linear(x, W0, None, v, own, mode == "signs", tasks)
    pair = reference.values(v, I, mode == "signs")
    size = W0.double().norm() + max(reference.decode(d, pair, I).double().norm() for d in own.values())
    error = (y.double() - in_fp64(x, W0, None, v, own, mode == "signs", tasks)).norm()
    assert error <= ROUNDING[dtype] * x.double().norm() * size


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_mixed_batch_is_the_loop_over_its_tasks_bit_for_bit(dtype: torch.dtype, isa: str) -> None:
    O, I = 37, 201
    v, own, W0 = shared("int4", O, I, False), deltas(O, I, 3), randn(O, I, dtype=dtype)
    x, tasks = randn(11, I, dtype=dtype), ["t2", "t0", "t1", "t2", "t2", "t1", "t0", "t2", "t2", "t0", "t2"]
    y = kernel.linear(x, W0, None, v, own, False, tasks)
    alone = torch.cat([kernel.linear(x[i : i + 1], W0, None, v, own, False, [t]) for i, t in enumerate(tasks)])
    assert torch.equal(y, alone)
    x = randn(60, I, dtype=dtype)
    tasks = ["t0" if i % 3 else "t1" if i % 2 else "t2" for i in range(60)]  # 40, 10 and 10 rows
    y = kernel.linear(x, W0, None, v, own, False, tasks)
    for t in own:
        rows = [i for i, name in enumerate(tasks) if name == t]
        assert torch.equal(y[rows], kernel.linear(x[rows], W0, None, v, own, False, [t]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(y, kernel.linear(x, W0, None, v, own, False, tasks))
    finally:
        torch.set_num_threads(threads)


def test_empty_masks_give_the_base_and_full_ones_base_and_vector(isa: str) -> None:
    O, I = 20, 64
    v, W0 = shared("bf16", O, I, False), randn(O, I, dtype=BF16)
    own = {name: kernel.Delta(torch.full((O, 2), bits, dtype=torch.int32), 1.0) for name, bits in (("none", 0), ("all", -1))}
    x = randn(5, I, dtype=BF16)
    base = kernel.linear(x, W0, None, v, own, False, ["none"])
    assert torch.equal(base, kernel.linear(x, W0, None, v, own, False, ["none", None, "none", None, "none"]))
    assert relative(base, x.double() @ W0.double().T) < ROUNDING[BF16]
    full = kernel.linear(x, W0, None, v, own, False, ["all"])
    assert relative(full, x.double() @ (W0.double() + v.values.double()).T) < ROUNDING[BF16]
    assert torch.equal(kernel.linear(x, W0, None, v, own, False, [None]), torch.nn.functional.linear(x, W0))


def test_nan_and_inf_reach_every_output_of_their_row_alone(isa: str) -> None:
    v, own = shared("int8", 33, 128, False), deltas(33, 128, 2)
    for dtype in (F32, BF16):
        for bad in (float("nan"), float("inf")):
            x = randn(3, 128, dtype=dtype)
            x[1, 70] = bad
            y = kernel.linear(x, randn(33, 128, dtype=dtype), None, v, own, False, ["t0", "t1", None])
            assert not y[1].isfinite().any()
            assert y[[0, 2]].isfinite().all()


def test_strides_and_leading_dimensions_are_followed(isa: str) -> None:
    v, own, W0 = shared("bf16", 20, 64, True), deltas(20, 64, 2), randn(20, 64)
    for x in (randn(2, 3, 64), randn(4, 128)[:, :64], randn(64, 6).T, randn(2, 9, 64)[:, ::2]):
        y = kernel.linear(x, W0, torch.ones(20), v, own, True, ["t0", "t1"])
        want = in_fp64(x, W0, torch.ones(20), v, own, True, ["t0", "t1"])
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    assert kernel.linear(randn(0, 64), W0, None, v, own, True, ["t0"]).shape == (0, 20)
    with pytest.raises(ValueError, match="3 rows cannot be shared out over 2 tasks"):
        kernel.linear(randn(3, 64), W0, None, v, own, True, ["t0", "t1"])


def test_what_cannot_run_goes_the_references_way(monkeypatch: pytest.MonkeyPatch) -> None:
    v, own, W0 = shared("bf16", 20, 64, False), deltas(20, 64, 1), randn(20, 64)
    x = randn(2, 64)
    monkeypatch.setenv("COMPRESS_BACKEND", "tiled")
    want = reference.linear(x, W0, None, v, own, False, ["t0"])
    assert torch.equal(kernel.linear(x, W0, None, v, own, False, ["t0"]), want)
    monkeypatch.delenv("COMPRESS_BACKEND")
    for why, args in (
        ("float64", (x.double(), W0.double(), None, v)),
        ("dtypes", (x.bfloat16(), W0, None, v)),
        ("contiguous", (x, randn(64, 20).T, None, v)),
        ("5 bits", (x, W0, None, kernel.Shared(v.values, v.values[:, :1], 5, 0))),
    ):
        assert why in str(cpu.can_run(*args))
    assert kernel.linear(x.double(), W0.double(), None, v, own, False, ["t0"]).dtype == torch.float64


def test_what_the_library_cannot_run_is_refused_before_any_pointer_is_touched() -> None:
    library: Any = native._load()
    call = native.Call(1, 64, 0, 1, None, None, None, 1 << 20)
    task = (ctypes.c_int32 * 1)(0)
    good = native.MaskedDelta(64, 16, 0, 0, None, None, native.Shared(1, 128, 64), native.Shared(), 1, None, None, task)
    wrong_fields = (
        ("K", 0, 1), ("N", 0, 1), ("tasks", 0, 1), ("one", native.Shared(4), 2), ("one", native.Shared(1, 128, 0), 1),
        ("one", native.Shared(2, 128, 64), 1),
    )  # fmt: skip
    for field, value, code in wrong_fields:
        bad = native.MaskedDelta.from_buffer_copy(good)
        setattr(bad, field, value)
        assert library.cc_masked_delta(0, bad, call) == code, field
    for wrong in (1, -2):
        task[0] = wrong
        assert library.cc_masked_delta(0, good, call) == 1
    call.workspace_bytes = 8
    assert library.cc_masked_delta(0, good, call) == 4
    call.type = 3
    assert library.cc_masked_delta(0, good, call) == 2
    assert library.cc_masked_delta(9, good, call) == 3


def test_the_op_passes_torchs_own_checks() -> None:
    v, own, W0 = shared("int4", 20, 64, False, low=True, group=32), deltas(20, 64, 2), randn(20, 64)
    assert v.low is not None
    masks = [d.mask for d in own.values()]
    args = (
        randn(3, 64), W0, torch.ones(20), v.values, v.scale, 4, 8, v.low.values, v.low.scale, 4, 8, True, masks, [0.5, 0.75],
        [1, -1, 0], False,
    )  # fmt: skip
    torch.library.opcheck(cpu._op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    run = torch.compile(lambda x: kernel.linear(x, W0, None, v, own, False, ["t0", "t1"]), backend="aot_eager", fullgraph=True)
    x = randn(2, 64)
    assert torch.equal(run(x), kernel.linear(x, W0, None, v, own, False, ["t0", "t1"]))

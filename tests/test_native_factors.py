"""The C++ kernels of kinds that are several products, thin factors with columns and ARMOR's blocks, against fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compress_kernels import armor, lost, lowrank_sparse, native
from compress_kernels import bits as bitpack
from compress_kernels.lowrank_sparse import cpu
from conftest import rows_and_threads_change_no_bit
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")
ISAS = native.ISAS[: native._isa("") + 1] if native.missing() is None else ("scalar",)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 1e-5, BF16: 1e-2, F16: 1.5e-3}  # of outputs and of what goes from one product to the next
INT8 = 0.04  # activations of 8 bits, twice
ROWS = (1, 3, 16, 17, 64, 257)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COMPRESS_ISA", request.param)
    return str(request.param)


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm().clamp(min=1e-9))


def factors(
    O: int, I: int, rank: int, kept: int, compact: bool = True, stored: torch.dtype = BF16
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    columns = torch.randperm(I, generator=torch.Generator().manual_seed(O))[:kept].sort().values
    tensors = {"columns": columns.to(torch.int32).to(torch.uint16)} if kept else {}
    if rank:
        tensors |= {"B": randn(O, rank, dtype=stored), "A": randn(rank, I - kept if compact else I, dtype=stored, seed=2)}
    if kept:
        tensors["W_s"] = randn(O, kept, dtype=stored, seed=3)
    return tensors, {"rank": rank, "columns": kept, **({} if compact else {"compact": False})}


def coded(
    O: int, I: int, rank: int, kept: int, bits: int, group: int, compact: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, params = factors(O, I, rank, kept, compact)
    g = torch.Generator().manual_seed(O + bits)
    out = {"columns": tensors["columns"]} if kept else {}
    for name, rows, length in (("A", rank, I - kept if compact else I), ("U", O, rank + kept)):
        if not rows:
            continue
        width = lowrank_sparse.reference.padded(length, group)
        q = torch.randint(0, 1 << bits, (rows, width), generator=g, dtype=torch.uint8)
        q[:, length:] = 1 << (bits - 1)
        out[f"{name}_packed"] = bitpack.pack(q, bits)
        out[f"{name}_scale"] = ((torch.rand(rows, width // group, generator=g) + 0.5) / (1 << bits)).to(BF16)
    return out, {**params, "value_bits": bits, "value_group": group}


def check(
    tensors: dict[str, torch.Tensor], params: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, path: str, most: float
) -> None:
    p = lowrank_sparse.prepare(tensors, params, shape, dtype)
    assert p.path == path
    bias = randn(shape[0], dtype=dtype, seed=9)
    for M in ROWS:
        x = randn(M, shape[1], dtype=dtype, seed=M)
        y = lowrank_sparse.linear(x, p, bias)
        assert y.dtype == dtype
        want = lowrank_sparse.reference.linear(x.double(), tensors, params, shape, bias.double())
        assert relative(y, want) < most, (shape, params, M, dtype)


SHAPES = [(48, 256, 16, 64), (37, 201, 9, 31), (5, 17, 3, 0), (1, 16, 0, 8), (33, 577, 32, 66), (66, 40, 7, 40)]


@pytest.mark.parametrize("compact", [True, False])
def test_plain_factors_agree_with_fp64(compact: bool, isa: str) -> None:
    for i, (O, I, rank, kept) in enumerate(SHAPES):
        if kept in (0, I) and not compact:
            continue
        dtype = (BF16, F32, F16)[i % 3] if compact else (F32, F16, BF16)[i % 3]
        path = "factors" if rank and kept == I else "cpu"  # A without inputs
        check(*factors(O, I, rank, kept, compact, F16 if dtype == F16 else BF16), (O, I), dtype, path, ROUNDING[dtype])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_coded_factors_agree_with_fp64(bits: int, isa: str) -> None:
    for i, (O, I, rank, kept, group) in enumerate(
        [(48, 256, 16, 64, 64), (37, 201, 9, 31, 32), (19, 96, 12, 0, 32), (5, 64, 0, 40, 32)]
    ):
        dtype, exact = ((BF16, False), (F32, True), (F16, False))[(i + bits) % 3]
        path = f"factors+{'cpu-exact' if exact else 'cpu'}"
        check(*coded(O, I, rank, kept, bits, group, i != 1), (O, I), dtype, path, ROUNDING[dtype] + (0 if exact else INT8))


@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_losts_layers_agree_with_fp64(activation: str, isa: str) -> None:
    for i, (O, I, rank, kept) in enumerate([(48, 256, 16, 64), (37, 201, 9, 31), (5, 17, 3, 0)]):
        dtype = (BF16, F32, F16)[i]
        tensors, _ = factors(O, I, rank, kept, compact=False, stored=F16 if dtype == F16 else BF16)
        tensors = {"W_s": torch.empty(O, 0), "columns": torch.empty(0, dtype=torch.int32), **tensors}
        params = {"rank": rank, "kept": kept, "gamma": 0.3, "activation": activation}
        p = lost.prepare(tensors, params, (O, I), dtype)
        assert p.path == "cpu"
        for M in ROWS:
            x, bias = randn(M, I, dtype=dtype, seed=M) / 8, randn(O, dtype=dtype)
            want = lost.reference.linear(x.double(), tensors, params, bias.double())
            assert relative(lost.linear(x, p, bias), want) < 2 * ROUNDING[dtype]
    assert lost.prepare(tensors, params, (O, I), dtype, exact=True).path == "factors"


def armored(O: int, I: int, b_out: int, b_in: int, quantized: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(O)
    meta = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)[torch.randint(0, 6, (O, I // 4), generator=g)]
    tensors = {
        "meta": meta[:, ::2] | meta[:, 1::2] << 4,
        "pre": randn(I // b_in, b_in, b_in, dtype=BF16) / b_in**0.5,
        "post": randn(O // b_out, b_out, b_out, dtype=BF16, seed=2) / b_out**0.5,
    }
    params: dict[str, Any] = {"n": 2, "m": 4, "b_in": b_in, "b_out": b_out}
    if not quantized:
        return {**tensors, "values": randn(O, I // 2, dtype=BF16, seed=3)}, params
    q = torch.randint(0, 16, (O, I // 2), generator=g, dtype=torch.uint8)
    tensors |= {"weight_packed": bitpack.pack(q, 4), "weight_scale": (torch.rand(O, I // 32, generator=g) + 0.5).to(BF16)}
    return tensors, {**params, "core": "sparse24_int", "bits": 4, "group_size": 32, "symmetric": True}


@pytest.mark.parametrize("quantized", [False, True])
def test_armors_three_products_agree_with_fp64(quantized: bool, isa: str) -> None:
    for i, (O, I, b_out, b_in) in enumerate([(48, 256, 16, 64), (36, 192, 9, 96), (7, 64, 1, 2), (34, 96, 34, 48)]):
        dtype = (BF16, F32, F16)[i % 3]
        tensors, params = armored(O, I, b_out, b_in, quantized)
        p = armor.prepare(tensors, params, (O, I), dtype)
        assert p.path == "cpu"
        for M in ROWS:
            x, bias = randn(M, I, dtype=dtype, seed=M), randn(O, dtype=dtype)
            want = armor.reference.linear(x.double(), tensors, params, (O, I), bias.double())
            assert relative(armor.linear(x, p, bias), want) < 2 * ROUNDING[dtype], (O, I, M, dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 90), st.integers(0, 12), st.integers(0, 90), st.booleans(), st.integers(1, 20),
    st.sampled_from([F32, BF16, F16]),
)  # fmt: skip
def test_any_factors_agree_with_fp64(O: int, I: int, rank: int, kept: int, compact: bool, M: int, dtype: torch.dtype) -> None:
    rank, kept = min(rank, O, I), min(kept, I)
    if not rank and not kept:
        kept = 1
    tensors, params = factors(O, I, rank, kept, compact or not 0 < kept < I, F16 if dtype == F16 else BF16)
    x = randn(M, I, dtype=dtype, seed=M)
    y = lowrank_sparse.linear(x, lowrank_sparse.prepare(tensors, params, (O, I), dtype))
    A, U = (t.double() for t in lowrank_sparse.reference.factors(tensors, params, (O, I)))
    error = (y.double() - lowrank_sparse.reference.linear(x.double(), tensors, params, (O, I))).norm()
    assert error <= ROUNDING[dtype] * x.double().norm() * U.norm() * (1 + A.norm())


def products() -> list[tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]]:
    """(inputs, outputs, product) of each kind, fp32."""
    low = lowrank_sparse.prepare(*factors(37, 201, 9, 31), (37, 201), F32)
    code = lowrank_sparse.prepare(*coded(37, 96, 9, 31, 4, 32), (37, 96), F32)
    arm = armor.prepare(*armored(36, 96, 9, 32), (36, 96), F32)
    return [
        (201, 37, lambda x: lowrank_sparse.linear(x, low)),
        (96, 37, lambda x: lowrank_sparse.linear(x, code)),
        (96, 36, lambda x: armor.linear(x, arm)),
    ]


def test_rows_of_x_and_threads_change_no_bit(isa: str) -> None:
    for I, _, product in products():
        rows_and_threads_change_no_bit(product, randn(17, I))


def test_rows_of_bf16_x_change_no_bit(isa: str) -> None:
    low = lowrank_sparse.prepare(*factors(37, 201, 9, 31), (37, 201), BF16)
    arm = armor.prepare(*armored(36, 96, 9, 32), (36, 96), BF16)
    for I, product in ((201, lambda x: lowrank_sparse.linear(x, low)), (96, lambda x: armor.linear(x, arm))):
        x = randn(17, I, dtype=BF16)
        assert torch.equal(product(x), torch.cat([product(x[i : i + 1]) for i in range(17)]))


def test_nan_and_inf_reach_every_output_of_their_row_alone(isa: str) -> None:
    for I, _, product in products():
        for bad in (float("nan"), float("inf")):
            x = randn(3, I)
            x[1, 0] = bad
            y = product(x)
            assert not y[1].isfinite().any() or I == 96  # a pruned weight and a block pass nothing on
            assert not y[1].isfinite().all()
            assert y[[0, 2]].isfinite().all()


def test_strides_and_leading_dimensions_are_followed(isa: str) -> None:
    for I, O, product in products():
        want = product(torch.eye(I)).T.double()
        for x in (randn(2, 3, I), randn(4, 2 * I)[:, :I], randn(I, 5).T, randn(3, 9, I)[:, ::2], randn(0, I), randn(I)):
            y = product(x)
            assert y.shape == (*x.shape[:-1], O)
            assert (y.double() - x.double() @ want.T).norm() <= 1e-4 * (1 + x.norm() * want.norm())
        with pytest.raises((ValueError, RuntimeError)):
            product(torch.ones(1, I + 1))


def test_what_cannot_run_is_refused_before_any_pointer_is_touched() -> None:
    library: Any = native._load()
    call = native.Call(1, 64, 0, 1, None, None, None, 1 << 20)
    good = native.Factors(64, 16, 4, 48, 16, 48, 20)
    bad_fields = (
        ("K", 0), ("N", 0), ("rank", -1), ("first", 65), ("last", 65), ("padded", 47), ("joined", 19), ("last", -1), ("first", -1),
    )  # fmt: skip
    for field, value in bad_fields:
        bad = native.Factors.from_buffer_copy(good)
        setattr(bad, field, value)
        assert library.cc_factors(0, bad, call) == 1, field
    core = native.Masked(64, 16, 0, 0, 0)
    block = native.Armor(32, 16, None, None, cpu.ctypes.pointer(core))
    for field, value in (("block_in", 0), ("block_in", 48), ("block_out", 5), ("block_out", -16)):
        bad = native.Armor.from_buffer_copy(block)
        setattr(bad, field, value)
        assert library.cc_armor(0, bad, call) == 1, field
    core.group = 24
    assert library.cc_armor(0, block, call) == 1
    call.workspace_bytes = 8
    core.group = 0
    assert library.cc_factors(0, good, call) == library.cc_armor(0, block, call) == 4
    call.type = 3
    assert library.cc_factors(0, good, call) == library.cc_armor(0, block, call) == 2
    assert library.cc_factors(9, good, call) == library.cc_armor(9, block, call) == 3


def test_the_ops_pass_torchs_own_checks() -> None:
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    low = lowrank_sparse.prepare(*factors(37, 201, 9, 31), (37, 201), F32)
    w = low.native
    assert w is not None
    torch.library.opcheck(cpu._op, (randn(3, 201), w.order, w.A, w.U, w.job.first, w.job.last, False, None), test_utils=utils)
    arm = armor.prepare(*armored(36, 96, 9, 32), (36, 96), F32)
    assert arm.native is not None
    c = arm.native.core
    args = randn(3, 96), arm.native.pre, arm.native.post, c.mask, c.start, c.values, None, None, 0
    torch.library.opcheck(armor.cpu._op, args, test_utils=utils)
    code = lowrank_sparse.prepare(*coded(36, 96, 9, 31, 4, 32), (36, 96), F32)
    plain = torch.compile(lambda x: lowrank_sparse.linear(x, low), backend="aot_eager", fullgraph=True)
    others = torch.compile(lambda z: armor.linear(z, arm) + lowrank_sparse.linear(z, code), backend="aot_eager", fullgraph=True)
    x, z = randn(2, 201), randn(2, 96)
    assert torch.equal(plain(x), lowrank_sparse.linear(x, low))
    torch.testing.assert_close(others(z), armor.linear(z, arm) + lowrank_sparse.linear(z, code))


def test_a_copy_has_pointers_of_its_own() -> None:
    for kind, p, I in (
        (lowrank_sparse, lowrank_sparse.prepare(*factors(37, 201, 9, 31), (37, 201), F32), 201),
        (armor, armor.prepare(*armored(36, 96, 9, 32), (36, 96), F32), 96),
    ):
        x = randn(2, I)
        want = kind.linear(x, p)
        other = copy.deepcopy(p.native)
        del p
        assert torch.equal((cpu if kind is lowrank_sparse else armor.cpu).linear(x, other), want)

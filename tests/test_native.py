"""The C++ kernels against fp64, for every instruction set that this machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_kernels import BackendError, native
from compress_kernels import bits as bitpack
from compress_kernels.int_grouped import cpu
from compress_kernels.native import masked, pages
from conftest import python, rows_and_threads_change_no_bit
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")
ISAS = native.ISAS[: native._isa("") + 1] if native.missing() is None else ("scalar",)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 1e-5, BF16: 5e-3, F16: 6e-4}  # of outputs; fp32 sums of a few hundred terms
INT8 = 0.03  # activations of 8 bits on few random numbers; 0.6 % on many


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COMPRESS_ISA", request.param)
    return str(request.param)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm().clamp(min=1e-9))


def integers(
    O: int, I: int, group: int, bits: int, symmetric: bool, stored: torch.dtype, exact: bool, outliers: bool = False
) -> tuple[cpu.Weight, torch.Tensor]:
    """A random weight in the kernel's layout, and dense in fp64."""
    g = generator(O * I + bits)
    q = torch.randint(0, 1 << bits, (O, I), generator=g, dtype=torch.uint8)
    scale = (torch.rand(O, I // group, generator=g) + 0.5).to(stored)
    zero = None if symmetric else torch.randint(0, 1 << bits, (O, I // group), generator=g, dtype=torch.uint8)
    middle = torch.full((O, I // group), 1 << (bits - 1), dtype=torch.uint8) if zero is None else zero
    csr = None
    if outliers:
        kept = torch.rand(O, I, generator=g) < 0.1
        q[kept] = middle.repeat_interleave(group, 1)[kept]
        values = torch.randn(int(kept.sum()), generator=g).to(BF16 if stored == F32 else stored)
        indptr = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        csr = indptr, kept.nonzero()[:, 1].to(torch.int16), values
    W = (q.double() - middle.double().repeat_interleave(group, 1)) * scale.double().repeat_interleave(group, 1)
    if csr is not None:
        W[kept] = csr[2].double()
    return cpu.prepare(bitpack.pack(q, bits), scale, zero, (O, I), bits, exact, csr), W


SHAPES = [(48, 256, 64), (37, 192, 96), (5, 96, 32), (1, 64, 16), (33, 576, 576)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("exact", [True, False])
def test_grouped_integers_agree_with_fp64(bits: int, exact: bool, isa: str) -> None:
    for i, (O, I, group) in enumerate(SHAPES):
        stored, dtype = (BF16, F16, F32)[i % 3], (F32, BF16, F16)[(i + bits) % 3]
        weight, W = integers(O, I, group, bits, i % 2 == 0, stored, exact, outliers=i in (1, 3))
        for M in (1, 3, 16, 17):
            x = randn(M, I, dtype=dtype)
            y = cpu.linear(x, weight)
            assert y.dtype == dtype
            assert relative(y, x.double() @ W.T) < ROUNDING[dtype] + (0 if exact else INT8), (O, I, group, M, dtype)


@pytest.mark.parametrize("density", [0.0, 0.13, 0.5, 1.0])
def test_masked_floats_agree_with_fp64(density: float, isa: str) -> None:
    for i, (O, I) in enumerate([(48, 256), (37, 200), (5, 17), (1, 16), (33, 577)]):
        stored, dtype = (BF16, F16, F32)[i % 3], (F32, BF16, F16)[i % 2]
        kept = (torch.rand(O, I, generator=generator(i)) < density).to(torch.uint8)
        W = randn(O, I, dtype=stored) * kept
        weight = masked.prepare(kept, W[kept.bool()])
        for M in (1, 3, 17, masked.ROWS_OF_X + 1):
            x = randn(M, I, dtype=dtype)
            want = x.double() @ W.double().T
            assert relative(masked.linear(x, weight), want) < 2 * ROUNDING[dtype]  # many rows round the weights too


def test_panels_of_many_rows_of_x_agree_with_fp64_and_with_any_batch() -> None:
    for O, I, group in ((37, 200, 0), (5, 17, 0), (150, 2080, 0), (43, 1056, 32)):
        kept = (torch.rand(O, I, generator=generator(O)) < 0.5).to(torch.uint8)
        if group:
            kept = (torch.rand(O, I // 4, 4, generator=generator(O)).argsort(-1) < 2).view(O, I).to(torch.uint8)
            q = torch.randint(0, 16, (O, I // 2), dtype=torch.uint8, generator=generator(I))
            weight = masked.prepare_codes(kept, q, (torch.rand(O, I // group, generator=generator()) + 0.5).bfloat16(), None)
        else:
            weight = masked.prepare(kept, randn(O, I, dtype=BF16)[kept.bool()])
        W = masked.linear(torch.eye(I), weight).double().T  # exact products with ones
        for M in (12, 17, 40, 64, 300):
            x = randn(M, I, dtype=BF16, seed=M)
            y = masked.linear(x, weight)
            assert relative(y, x.double() @ W.T) < 2 * ROUNDING[BF16], (O, I, M)
            if masked.in_panels(x, weight):
                some = min(M, 17)  # fewer take another way, with another order of sums
                assert torch.equal(y[-some:], masked.linear(x[-some:], weight))
                threads = torch.get_num_threads()
                try:
                    torch.set_num_threads(2)
                    assert torch.equal(y, masked.linear(x, weight))
                finally:
                    torch.set_num_threads(threads)


@pytest.mark.parametrize("symmetric", [True, False])
def test_sparse_codes_agree_with_fp64(symmetric: bool, isa: str) -> None:
    for i, (O, I, group) in enumerate([(48, 256, 64), (33, 192, 16), (7, 96, 96)]):
        kept = (torch.rand(O, I // 4, 4, generator=generator(i)).argsort(-1) < 2).view(O, I).to(torch.uint8)
        q = torch.randint(0, 16, (O, I // 2), dtype=torch.uint8, generator=generator(i))
        scale = (torch.rand(O, I // group, generator=generator(i)) + 0.5).to((BF16, F16, F32)[i])
        zero = None if symmetric else torch.randint(0, 16, (O, I // group), dtype=torch.uint8, generator=generator(i))
        W = torch.zeros(O, I, dtype=torch.float64)
        W[kept.bool()] = q.double().view(-1)
        middle = 8 if zero is None else zero.double().repeat_interleave(group, 1)
        W = (W - middle) * kept * scale.double().repeat_interleave(group, 1)
        weight = masked.prepare_codes(kept, q, scale, zero)
        for dtype in (F32, BF16):
            for M in (1, 3, 40):
                x = randn(M, I, dtype=dtype)
                assert relative(masked.linear(x, weight), x.double() @ W.T) < 2 * ROUNDING[dtype]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 5), st.sampled_from([16, 32, 48, 64, 96, 160]), st.sampled_from([2, 3, 4, 8]), st.booleans(),
    st.booleans(), st.integers(1, 20), st.sampled_from([F32, BF16, F16]),
)  # fmt: skip
def test_any_shape_agrees_with_fp64(
    O: int, groups: int, group: int, bits: int, symmetric: bool, exact: bool, M: int, dtype: torch.dtype
) -> None:
    weight, W = integers(O, groups * group, group, bits, symmetric, F16, exact)
    x = randn(M, groups * group, dtype=dtype, seed=M)
    error = (cpu.linear(x, weight).double() - x.double() @ W.T).norm()
    assert error <= (ROUNDING[dtype] + (0 if exact else 0.01)) * x.double().norm() * W.norm()


def test_rows_of_x_and_threads_change_no_bit(isa: str) -> None:
    weight, _ = integers(48, 256, 64, 4, False, BF16, False)
    kept = (torch.rand(48, 256, generator=generator()) < 0.5).to(torch.uint8)
    sparse = masked.prepare(kept, randn(int(kept.sum()), dtype=BF16))
    x = randn(17, 256)
    for product in (lambda v: cpu.linear(v, weight), lambda v: masked.linear(v, sparse)):
        rows_and_threads_change_no_bit(product, x)


def test_outliers_of_many_tiles_agree_with_fp64_and_threads_change_no_bit(isa: str) -> None:
    weight, W = integers(1100, 1024, 128, 4, False, BF16, False, outliers=True)
    x = randn(2, 1024)
    y = cpu.linear(x, weight)
    assert relative(y, x.double() @ W.T) < ROUNDING[F32] + INT8
    rows_and_threads_change_no_bit(lambda v: cpu.linear(v, weight), x)
    rows_and_threads_change_no_bit(lambda v: cpu.linear(v, weight), x[:1])


@pytest.mark.parametrize("exact", [True, False])
def test_nan_and_inf_reach_every_output_of_their_row_alone(exact: bool, isa: str) -> None:
    weight, _ = integers(33, 128, 64, 4, False, BF16, exact)
    sparse = masked.prepare(torch.ones(33, 128, dtype=torch.uint8), torch.ones(33 * 128))
    for bad in (float("nan"), float("inf")):
        x = randn(3, 128)
        x[1, 70] = bad
        for y in (cpu.linear(x, weight), masked.linear(x, sparse)):
            assert not y[1].isfinite().any()
            assert y[[0, 2]].isfinite().all()


def test_strides_and_leading_dimensions_are_followed(isa: str) -> None:
    weight, W = integers(20, 64, 32, 4, True, F32, True)
    for x in (randn(2, 3, 64), randn(4, 128)[:, :64], randn(64, 5).T, randn(3, 9, 64)[:, ::2], randn(0, 64), randn(64)):
        y = cpu.linear(x, weight, torch.ones(20))
        assert y.shape == (*x.shape[:-1], 20)
        torch.testing.assert_close(y.double(), x.double() @ W.T + 1, rtol=1e-4, atol=1e-4)


def test_what_cannot_run_is_refused_before_any_pointer_is_touched() -> None:
    library: Any = native._load()
    good = native.IntGrouped(64, 16, 32, 32, 4, 0, 0, 0, None, None, None, None, None, None)
    call = native.Call(1, 64, 0, 1, None, None, None, 1 << 20)
    for field, value, code in (("bits", 5, 2), ("group", 48, 1), ("sub", 12, 1), ("K", 0, 1), ("N", -1, 1), ("scale_type", 7, 2)):
        bad = native.IntGrouped.from_buffer_copy(good)
        setattr(bad, field, value)
        assert library.cc_int_grouped(0, bad, call) == code, field
    assert library.cc_int_grouped(9, good, call) == 3
    call.workspace_bytes = 8
    assert library.cc_int_grouped(0, good, call) == 4
    sparse = native.Masked(64, 16, 24, 0, 0, None, None, None, None, None)
    assert library.cc_masked(0, sparse, call) == 1
    assert library.cc_masked_rows(0, native.Masked(64, 16, 0, 0, 0), 10, 7, 0, None, 1) == 1
    with pytest.raises(ValueError, match="x has 32 inputs, the weight has 64"):
        cpu.linear(torch.ones(1, 32), integers(16, 64, 32, 4, True, F32, True)[0])


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_ISA", "mmx")
    with pytest.raises(BackendError, match="there are scalar, avx2, avx512, avx512-bf16"):
        native.isa()


def test_the_ops_pass_torchs_own_checks() -> None:
    weight, _ = integers(20, 64, 32, 4, False, BF16, False, outliers=True)
    assert weight.outliers is not None
    parts = weight.codes, weight.scale, weight.zero, list(weight.outliers)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(cpu._op, (randn(3, 64), *parts, 20, 4, False), test_utils=utils)
    sparse = masked.prepare(torch.ones(20, 64, dtype=torch.uint8), torch.ones(20 * 64))
    args = randn(3, 64), sparse.mask, sparse.start, sparse.values, None, None, 20, 0
    torch.library.opcheck(masked._op, args, test_utils=utils)
    run = torch.compile(lambda x: cpu.linear(x, weight) + masked.linear(x, sparse), backend="aot_eager", fullgraph=True)
    x = randn(2, 64)
    assert torch.equal(run(x), cpu.linear(x, weight) + masked.linear(x, sparse))


@pytest.mark.parametrize("count", [0, 1000, pages.HUGE, 2 * pages.HUGE + 77])
def test_memory_for_large_weights_begins_at_a_huge_page(count: int) -> None:
    room = pages.empty(count)
    assert room.shape == (count,)
    assert room.dtype == torch.uint8
    assert count < pages.HUGE or room.data_ptr() % pages.HUGE == 0
    assert room.untyped_storage().nbytes() == count  # what lies around it is never touched
    kept = room.fill_(7)[count // 2 :]
    del room
    assert bool((kept == 7).all())


def test_one_openmp_runtime_is_loaded() -> None:
    done = python(
        "import torch; from compress_kernels import native; native._load(); "
        "print({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l})"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gomp") <= 1

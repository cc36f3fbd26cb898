"""Grouped integers with exact outliers: bytes, damage, bits, and every kernel path against the reference."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from compress_kernels import int_grouped_outliers as kernel
from compress_kernels.int_grouped import cpu_int4
from compress_kernels.int_grouped import tiled as int_grouped_tiled
from compress_kernels.int_grouped_outliers import csr, reference, tiled
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import registry
from compress.checkpoint import dtypes
from compress.formats import int_grouped
from compress.formats import int_grouped_outliers as form
from compress.modules import CompressedLinear
from compress.types import Packed

F16, BF16 = torch.float16, torch.bfloat16


class Case(NamedTuple):
    O: int = 20
    I: int = 48
    bits: int = 3
    group: int = 16
    symmetric: bool = False
    rho: float = 0.02  # 0.02: a few outliers
    E: torch.dtype = F16
    second: bool = False


def random_parts(c: Case, seed: int = 0) -> form.Unpacked:
    """What `pack` takes: random codes and statistics, ceil(rho O I) outliers over zero-point codes; outputs of size about 1."""
    g = torch.Generator().manual_seed(seed)
    G = 1 if c.group == -1 else c.I // c.group
    q = torch.randint(0, 1 << c.bits, (c.O, c.I), generator=g, dtype=torch.uint8)
    zero = None if c.symmetric else torch.randint(0, 1 << c.bits, (c.O, G), generator=g, dtype=torch.uint8)
    z = torch.full((c.O, G), 1 << (c.bits - 1), dtype=torch.uint8) if zero is None else zero
    index = torch.randperm(c.O * c.I, generator=g)[: -int(-c.rho * c.O * c.I // 1)].sort().values
    q.view(-1)[index] = z.repeat_interleave(c.I // G, 1).reshape(-1)[index]
    size = 1 / (2**c.bits * c.I**0.5)
    if c.second:
        low, step = (((torch.rand(-(-c.O // 16), G, generator=g) + 0.5) * size / n).to(c.E) for n in (1, 8))
        codes = torch.randint(0, 8, (c.O, G), generator=g, dtype=torch.uint8)
        level, scale = (codes, low, step), reference.scales(codes, low, step)
    else:
        level, scale = None, ((torch.rand(c.O, G, generator=g) + 0.5) * size).to(c.E)
    value = torch.randn(len(index), generator=g).div_(4 * (1 + c.rho * c.I) ** 0.5).to(c.E)
    return form.Unpacked(q, scale, zero, index, value, level)


def pack(p: form.Unpacked, c: Case) -> Packed:
    scale = None if p.second else p.scale
    return form.pack(p.q, scale, p.zero, bits=c.bits, group_size=c.group, index=p.index, value=p.value, second=p.second)


def random_packed(*args: Any, **kwargs: Any) -> Packed:
    """A weight of `Case(*args, **kwargs)`."""
    case = Case(*args, **kwargs)
    return pack(random_parts(case), case)


def changed(packed: Packed, **tensors: torch.Tensor) -> Packed:
    return Packed(packed.kind, packed.version, packed.params, {**packed.tensors, **tensors}, packed.shape)


def prepared(packed: Packed, dtype: torch.dtype, exact: bool = False) -> kernel.Prepared:
    return kernel.prepare(packed.tensors, packed.params, packed.shape, dtype, exact)


GRIDS = [(48, 2, 16), (48, 3, 16), (96, 4, 32), (30, 8, -1), (51, 3, 17)]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40), st.sampled_from(GRIDS), st.booleans(), st.sampled_from([0.0, 0.02, 1.0]),
    st.sampled_from([F16, BF16]), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_what_is_packed_unpacks_to_itself_with_the_shapes_that_spec_promised(
    O: int, grid: tuple[int, int, int], symmetric: bool, rho: float, E: torch.dtype, second: bool, seed: int
) -> None:
    case = Case(O, *grid, symmetric, rho, E, second)
    parts = random_parts(case, seed)
    packed = pack(parts, case)
    spec = form.spec(packed.params, packed.shape, dtypes.NAME[case.E])
    assert {k: (dtypes.NAME[t.dtype], tuple(t.shape)) for k, t in packed.tensors.items()} == spec
    config = {k: packed.params[k] for k in ("bits", "group_size", "symmetric")}
    assert form.complete(config, spec) == packed.params
    again = form.unpack(packed)
    for name in ("q", "scale", "zero", "index", "value"):
        saw, want = getattr(again, name), getattr(parts, name)
        assert saw is want is None or (saw.dtype == want.dtype and torch.equal(saw, want)), name
    assert all(torch.equal(a, b) for a, b in zip(again.second or (), parts.second or (), strict=True))
    assert form.problems(packed) == []
    W = form.dequantize(packed)
    assert torch.equal(W.view(-1)[parts.index], parts.value.float())
    assert torch.equal(W, reference.dequantize(packed.tensors, case.bits, packed.shape))


def test_bytes_of_a_fixed_input_are_frozen() -> None:
    index, n = torch.arange(3, 960, 37), torch.arange(960)
    zero = (n[:60] * 3 % 8).view(20, 3).to(torch.uint8)
    q = (n * 5 % 8).to(torch.uint8).index_copy_(0, index, zero.repeat_interleave(16)[index]).view(20, 48)
    scale, offset, step = (((1 + n[: 3 * rows]) / by).to(F16).view(rows, 3) for rows, by in ((20, 64), (2, 32), (2, 256)))
    parts = form.Unpacked(q, scale, zero, index, ((n[:26] - 13) / 8).to(F16), None)
    second = dataclasses.replace(parts, second=((n[:60] % 8).view(20, 3).to(torch.uint8), offset, step))
    tensors = pack(parts, Case()).tensors | pack(second, Case()).tensors
    assert {name: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for name, t in tensors.items()} == {
        "weight_packed": "813dd88f8bafb303",
        "weight_shape": "024659c8af6652ff",
        "weight_zero_point": "ed1292f7c399e3bf",
        "weight_scale": "e02580e6bdec601e",
        "outlier_indptr": "f9481c51084f0704",
        "outlier_index": "4f1f454714a94c7d",
        "outlier_value": "62a6c6735f03f204",
        "weight_scale_packed": "25a3c2df6e23f342",
        "weight_scale_offset": "2de33e3e96c06ff3",
        "weight_scale_step": "1e7318023edb05a4",
    }


def test_the_dense_part_is_exactly_zero_under_outliers() -> None:
    for symmetric in (True, False):
        packed = random_packed(symmetric=symmetric, rho=0.1, E=BF16)
        dense = Packed(int_grouped.KIND, int_grouped.VERSION, packed.params, packed.tensors, packed.shape)
        assert int_grouped.dequantize(dense).view(-1)[form.unpack(packed).index].count_nonzero() == 0


def test_a_code_under_an_outlier_that_is_not_the_zero_point_is_refused() -> None:
    parts = random_parts(Case())
    parts.q.view(-1)[parts.index[3]] ^= 1
    with pytest.raises(AssertionError, match="zero-point"):
        pack(parts, Case())


def test_a_negative_zero_is_stored_as_zero() -> None:
    parts = random_parts(Case())
    parts.value.fill_(-0.0)
    assert not pack(parts, Case()).tensors["outlier_value"].signbit().any()


def test_wide_inputs_have_int32_columns_and_others_uint16() -> None:
    for I, want in ((1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)):
        q = torch.full((2, I), 2, dtype=torch.uint8)
        index, value = torch.tensor([0, I - 1, 2 * I - 1]), torch.ones(3, dtype=F16)
        packed = form.pack(q, value[:2, None], None, bits=2, group_size=-1, index=index, value=value)
        assert packed.tensors["outlier_index"].dtype == want
        assert torch.equal(form.unpack(packed).index, index)


def test_scales_and_outliers_of_an_fp32_checkpoint_are_fp16() -> None:
    assert [form.value_dtype(name) for name in ("F32", "F16", "BF16")] == ["F16", "F16", "BF16"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 128)])
def test_bits_follow_the_formula(bits: int, group: int, second: bool, symmetric: bool) -> None:
    O, I, rho = 64, 256, 1 / 64
    scales = 3 / group + 32 / (16 * group) if second else 16 / group
    zeros = 0 if symmetric else bits / group
    shape_and_rows = (128 + 32 * (O + 1)) / (O * I)  # weight_shape and outlier_indptr
    want = bits + scales + zeros + 32 * rho + shape_and_rows
    assert form.bits_per_weight(random_packed(O, I, bits, group, symmetric, rho, F16, second)) == pytest.approx(want)


@pytest.mark.parametrize(
    ("name", "place", "value", "why"),
    [
        ("indptr", 0, 1, "starts at 1, not 0"),
        ("indptr", 5, 96, "falls after row 5"),
        ("indptr", 5, -1, "falls after row 4"),
        ("indptr", 20, 95, "ends at 95, there are 96 outliers"),
        ("index", 7, 48, "column 48, the weight has 48 inputs"),
        ("index", 1, 0, "does not ascend in row 0"),
    ],
)
def test_a_damaged_side_car_is_named_and_refused(name: str, place: int, value: int, why: str) -> None:
    packed = random_packed(rho=0.1)
    tensor = packed.tensors[f"outlier_{name}"].clone()
    tensor[place] = value
    packed = changed(packed, **{f"outlier_{name}": tensor})
    assert any(why in problem for problem in form.problems(packed))
    with pytest.raises(ValueError, match=why):
        prepared(packed, torch.float32)


def test_a_side_car_that_lost_values_or_lies_over_other_codes_is_a_problem() -> None:
    packed = random_packed(second=True)
    with pytest.raises(ValueError, match="two equal lengths"):
        prepared(changed(packed, outlier_value=packed.tensors["outlier_value"][:-1]), torch.float32)
    moved = changed(packed, outlier_index=(packed.tensors["outlier_index"].int() ^ 1).to(torch.uint16))
    assert [problem[:23] for problem in form.problems(moved)] == ["the dense part is not 0"]


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.parametrize("rho", [0.0, 0.02, 1.0])
def test_the_csr_product_equals_the_masked_dense_product(rho: float, tokens: int) -> None:
    packed = random_packed(40, 96, rho=rho, E=BF16)
    unpacked, S = form.unpack(packed), torch.zeros(40, 96, dtype=torch.float64)
    S.view(-1)[unpacked.index] = unpacked.value.double()
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
    saw = csr.product(x, csr.prepare(*(packed.tensors[f"outlier_{n}"] for n in ("indptr", "index", "value"))))
    torch.testing.assert_close(saw.double(), x.double() @ S.T, rtol=1e-5, atol=1e-5)  # fp32 sums of up to 96 terms


CASES = [
    Case(1, 17, group=-1),
    Case(33, 48, second=True),
    Case(70, 64, 2, 32, True, 0.0, BF16, True),
    Case(100, 96, 4, 32, rho=0.1, E=BF16),
    Case(40, 96, 8, -1, E=BF16, second=True),
    Case(40, 96, symmetric=True, rho=1.0),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16, torch.float64])
def test_tiles_equal_the_reference_bit_for_bit(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int_grouped_tiled, "TILE", 32 * case.I)  # tiles of 32 rows, the last one short
    packed = random_packed(*case)
    p = prepared(packed, dtype, exact=True)
    bounds, W = p.parts.starts.tolist(), torch.empty(packed.shape, dtype=dtype)
    for i, out in enumerate(W.split(32)):
        tiled.dequantize(p.parts, p.bits, slice(32 * i, 32 * i + len(out)), slice(*bounds[i : i + 2]), out)
    assert torch.equal(W, reference.dequantize(packed.tensors, p.bits, packed.shape).to(dtype))


def inputs(tokens: int, I: int, dtype: torch.dtype) -> torch.Tensor:
    """x (2, tokens, I), not contiguous."""
    return torch.randn(2, 2 * tokens, I, generator=torch.Generator().manual_seed(1)).to(dtype)[:, ::2]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 17])
def test_the_tiled_product_agrees_with_fp64(case: Case, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int_grouped_tiled, "TILE", 32 * case.I)
    packed = random_packed(*case)
    p = prepared(packed, torch.float32)
    x, bias = inputs(tokens, case.I, torch.float32), torch.linspace(-1, 1, case.O)
    y = kernel.linear(x, p, bias)
    want = F.linear(x.double(), form.dequantize(packed).double(), bias.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)  # fp32 sums of up to 96 terms
    torch.testing.assert_close(y, reference.linear(x, packed.tensors, p.bits, packed.shape, bias), rtol=1e-5, atol=1e-5)


needs_int4pack = pytest.mark.skipif(
    cpu_int4.can_run(4, 32, (16, 32), BF16, torch.device("cpu")) is not None, reason="torch has no fast int4 kernel for this CPU"
)


@needs_int4pack
@pytest.mark.parametrize("E", [BF16, F16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("O", "I", "group"), [(16, 32, 32), (80, 256, -1), (48, 128, 64)])
def test_int4pack_with_outliers_is_close_to_the_reference(
    O: int, I: int, group: int, symmetric: bool, E: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", "int4pack")
    for rho, bias in ((0.0, None), (0.02, torch.ones(O, dtype=BF16)), (1.0, None)):
        packed = random_packed(O, I, 4, group, symmetric, rho, E)
        p = prepared(packed, BF16)
        assert p.path == "int4pack+csr"
        for tokens in (0, 1, 17, cpu_int4.ROWS_OF_X):  # the last one, twice 48, runs tiles
            x = inputs(tokens, I, BF16)
            y, want = kernel.linear(x, p, bias), F.linear(x.double(), form.dequantize(packed).double())
            want = want if bias is None else want + bias.double()
            assert (y.dtype, y.shape) == (BF16, want.shape)
            assert (y.double() - want).norm() <= 1e-2 * want.norm()  # bf16 outputs, scales and zeros: 3 * 2^-9


@pytest.mark.parametrize(
    ("case", "dtype", "exact", "why"),
    [
        (Case(16, 64, 4, 16, second=True), BF16, False, "groups of 16, int4pack has 32, 64, 128 and 256"),
        (Case(16, 64, 4, 32), torch.float32, False, "activations are float32"),
        (Case(16, 64, 3, 32), BF16, False, "3 bits"),
        (Case(16, 64, 4, 32), BF16, True, "exact results were asked for"),
        (Case(16, 64, 4, 32, second=True), BF16, False, "second level"),
    ],
)
@needs_int4pack
def test_the_reason_for_tiles_is_named(
    case: Case, dtype: torch.dtype, exact: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", "int4pack")
    p = prepared(random_packed(*case), dtype, exact)
    assert p.path == "tiled"
    assert why in p.reasons["int4pack+csr"]


@pytest.mark.parametrize("second", [True, False])
def test_the_tiled_op_passes_torchs_own_checks(second: bool) -> None:
    p = prepared(random_packed(40, 64, second=second, symmetric=second), torch.float32, exact=True)
    assert p.parts is not None
    args = (torch.randn(2, 3, 64), *p.parts, torch.zeros(40) if second else None, p.bits, p.rows)
    torch.library.opcheck(tiled.linear, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_both_paths_compile_without_a_graph_break(dtype: torch.dtype) -> None:
    p = prepared(random_packed(32, 64, 4, 32, E=BF16), dtype)
    run = torch.compile(lambda x: kernel.linear(x, p), backend="aot_eager", fullgraph=True)
    for tokens in (1, 2, 40):
        x = torch.randn(tokens, 64).to(dtype)
        assert torch.equal(run(x), kernel.linear(x, p))


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (BF16, 1.6e-2)])  # sums in another order
def test_a_compressed_linear_holds_the_tensors_and_multiplies_by_the_weight(dtype: torch.dtype, rtol: float, second: bool) -> None:
    packed = random_packed(40, 96, E=BF16, second=second)
    assert registry.by_kind(packed.kind) is form
    module = CompressedLinear(packed.kind, packed.params, packed.shape, stored="BF16", dtype=dtype, bias=True, device="cpu")
    assert dict(module.named_buffers()).keys() == packed.tensors.keys()
    for name, t in {**packed.tensors, "bias": torch.full((40,), 0.5)}.items():
        getattr(module, name).data.copy_(t)
    x = inputs(3, 96, dtype).contiguous()
    want = F.linear(x, form.dequantize(packed).to(dtype), module.bias)
    assert torch.equal(module.dense_weight(), form.dequantize(packed))
    torch.testing.assert_close(module(x), want, rtol=rtol, atol=1e-5)
    module.prepare()
    torch.testing.assert_close(module(x), want, rtol=rtol, atol=0.03 if module.path == "cpu" else 1e-5)  # activations of 8 bits
    assert module.to(torch.float64).outlier_value.dtype == BF16
    assert module(x.double()).dtype == torch.float64

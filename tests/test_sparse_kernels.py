"""Kernels of the sparse kinds: both paths against the reference, and the reference against fp64."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from compress_kernels import _sparse, armor, native
from compress_kernels.bitmask import tiled as bitmask_tiled
from compress_kernels.int_grouped import tiled as int_grouped_tiled
from compress_kernels.sparse24 import tiled as sparse24_tiled
from compress_kernels.sparse24_int import tiled as sparse24_int_tiled
from test_sparse_formats import BF16, F16, random_armor, random_bitmask, random_int, random_sparse24

from compress import registry
from compress.formats import sparse24_int
from compress.modules import CompressedLinear
from compress.types import Packed

DTYPES = [torch.float32, BF16, F16, torch.float64]
PATHS = ["dense", "tiled"]


def random_codes(O: int, I: int, bits: int, group: int, symmetric: bool, n: int = 2, m: int = 4, E: torch.dtype = F16) -> Packed:
    return sparse24_int.from_int_grouped(random_int(O, I, bits, group, symmetric, n, m, E), {"n": n, "m": m})


CASES: dict[str, Callable[[], Packed]] = {
    "2:4": lambda: random_sparse24(70, 48),
    "2:4 one row": lambda: random_sparse24(1, 12, E=BF16),
    "1:4": lambda: random_sparse24(33, 12, 1, 4, BF16),
    "4:8": lambda: random_sparse24(65, 64, 4, 8),
    "3:5": lambda: random_sparse24(37, 45, 3, 5),
    "bitmask": lambda: random_bitmask(70, 51, E=BF16),
    "bitmask empty": lambda: random_bitmask(33, 12, 0.0),
    "bitmask full": lambda: random_bitmask(33, 17, 1.0),
    "int 4 bits": lambda: random_codes(70, 64, 4, 16, True, E=BF16),
    "int 3 bits": lambda: random_codes(101, 48, 3, 16, False),
    "int 8 bits, 3:5": lambda: random_codes(40, 30, 8, -1, False, 3, 5),
    "armor": lambda: random_armor(70, 48, 12, 14),
    "armor, ragged": lambda: random_armor(70, 48, 20, 33),
    "armor, codes": lambda: random_armor(66, 64, 16, 33, random_codes(66, 64, 4, 16, False, E=BF16), BF16),
}
ONE_PER_KIND = ["3:5", "bitmask", "int 3 bits", "armor", "armor, codes"]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose a path; tiles have 32 rows."""
    monkeypatch.setattr(int_grouped_tiled, "TILE", 1)
    return lambda path: monkeypatch.setenv("COMPRESS_BACKEND", path)


def kernel(packed: Packed) -> ModuleType:
    return importlib.import_module(f"compress_kernels.{packed.kind}")


def prepared(packed: Packed, dtype: torch.dtype, exact: bool = False) -> _sparse.Prepared | armor.Prepared:
    return kernel(packed).prepare(packed.tensors, packed.params, packed.shape, dtype, exact)


def in_fp64(packed: Packed, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y from the stored values, every product in fp64."""
    if packed.kind != "armor":
        return F.linear(x.double(), registry.by_kind(packed.kind).dequantize(packed).double(), bias.double())
    core, pre, post = registry.by_kind(packed.kind).unpack(packed)
    S = registry.by_kind(core.kind).dequantize(core).double()
    A, B = (torch.block_diag(*blocks.double())[:size, :size] for blocks, size in zip((post, pre), packed.shape, strict=True))
    return x.double() @ (A @ S @ B).T + bias.double()


def inputs(tokens: int, I: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x (2, tokens, I), not contiguous."""
    return torch.randn(2, 2 * tokens, I, generator=torch.Generator().manual_seed(1)).to(dtype)[:, ::2]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_products_agree_with_fp64_on_every_shape_of_input(case: str, path: str, backend: Callable[[str], None]) -> None:
    backend(path)
    packed = CASES[case]()
    (O, I), p = packed.shape, prepared(packed, torch.float32)
    assert p.path == path
    bias = torch.linspace(-1, 1, O)
    for x in (inputs(1, I), inputs(17, I), inputs(0, I), inputs(3, I)[0, 1], torch.empty(0, I), inputs(3, I).mT.contiguous().mT):
        y, want = kernel(packed).linear(x, p, bias), in_fp64(packed, x, bias)
        assert (y.dtype, y.shape) == (torch.float32, (*x.shape[:-1], O))
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)  # fp32 sums of up to 64 terms
        by_definition = kernel(packed).reference.linear(x, packed.tensors, packed.params, packed.shape, bias)
        torch.testing.assert_close(y, by_definition, rtol=1e-5, atol=1e-5)
        assert torch.equal(y, by_definition) or path == "tiled"
        torch.testing.assert_close(kernel(packed).linear(x, p), y - bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("armor")])
def test_tiles_equal_the_reference_bit_for_bit(case: str, dtype: torch.dtype, backend: Callable[[str], None]) -> None:
    backend("dense")
    packed = CASES[case]()
    W = prepared(packed, dtype).weight
    want = kernel(packed).reference.dequantize(packed.tensors, packed.params, packed.shape)
    assert torch.equal(want, registry.by_kind(packed.kind).dequantize(packed))
    assert W is not None
    assert torch.equal(W, want.to(dtype))
    assert not W.masked_select(W == 0).signbit().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ONE_PER_KIND)
def test_products_in_bf16_round_like_the_reference(case: str, path: str, backend: Callable[[str], None]) -> None:
    backend(path)
    packed = CASES[case]()
    x, bias = inputs(9, packed.shape[1], BF16), torch.linspace(-1, 1, packed.shape[0]).to(BF16)
    y = kernel(packed).linear(x, prepared(packed, BF16, exact=True), bias)
    want = kernel(packed).reference.linear(x, packed.tensors, packed.params, packed.shape, bias)
    assert y.dtype == BF16
    torch.testing.assert_close(y, want, rtol=1.6e-2, atol=1.6e-2)  # two steps of bf16 where sums are in another order
    exact = in_fp64(packed, x, bias)
    assert (y.double() - exact).norm() <= 2e-2 * exact.norm()  # bf16 weights, blocks and results: 5 * 2^-9 and some


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ONE_PER_KIND)
def test_a_nan_among_the_inputs_reaches_every_output_of_its_token(case: str, path: str, backend: Callable[[str], None]) -> None:
    backend(path)
    packed = CASES[case]()
    x = inputs(3, packed.shape[1])[0].clone()
    x[1, 5] = float("nan")
    y = kernel(packed).linear(x, prepared(packed, torch.float32))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_the_blocks_of_armor_are_three_products_each_rounded(backend: Callable[[str], None]) -> None:
    backend("dense")
    packed = CASES["armor"]()
    x, (pre, post) = inputs(4, 48, BF16)[0], (packed.tensors[name].to(BF16) for name in ("pre", "post"))
    S = registry.by_kind("sparse24").dequantize(packed).to(BF16)
    want = x @ torch.block_diag(*pre).T @ S.T @ torch.block_diag(*post).T
    y = kernel(packed).linear(x, prepared(packed, BF16))
    torch.testing.assert_close(y, want, rtol=1.6e-2, atol=1.6e-2)


@pytest.mark.skipif(native.missing() is not None, reason="the C++ library is not built")
@pytest.mark.parametrize("case", ["armor, ragged", "armor"])
def test_any_blocks_around_the_native_core_agree_with_fp64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", "cpu")
    packed = CASES[case]()
    (O, I), p = packed.shape, prepared(packed, torch.float32)
    assert p.path == "cpu"
    bias = torch.linspace(-1, 1, O)
    for x in (inputs(1, I), inputs(17, I), inputs(0, I)):
        y = kernel(packed).linear(x, p, bias)
        torch.testing.assert_close(y.double(), in_fp64(packed, x, bias), rtol=1e-5, atol=1e-5)  # fp32 sums


def test_without_the_library_weights_are_held_dense_and_that_is_said_once_per_kind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _sparse._say_once.cache_clear()
    packed = CASES["2:4"]()
    monkeypatch.setattr(native, "missing", lambda: "not here")
    for value in (None, "", "cpu"):
        if value is None:
            monkeypatch.delenv("COMPRESS_BACKEND", raising=False)
        else:
            monkeypatch.setenv("COMPRESS_BACKEND", value)
        with caplog.at_level(logging.INFO, logger="compress_kernels"):
            assert prepared(packed, torch.float32).path == "dense"
    assert len(caplog.records) == 1
    assert "not here" in caplog.text
    prepared(CASES["bitmask"](), torch.float32)
    assert len(caplog.records) == 1 + ("bitmask" in caplog.text)


def test_an_unknown_backend_is_refused(backend: Callable[[str], None]) -> None:
    backend("cuda")
    for case in ONE_PER_KIND:
        with pytest.raises(ValueError, match=r"COMPRESS_BACKEND is 'cuda'; there are cpu, .*dense, tiled"):
            prepared(CASES[case](), torch.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("case", "tensor", "change", "why"),
    [
        ("2:4", "meta", torch.zeros_like, r"weight of shape 70 x 48: meta has positions \[0, 0\] in row 0, group 0"),
        ("2:4", "values", lambda t: t[:-1], r"values is \[69, 24\], wanted \[70, 24\]"),
        ("bitmask", "mask", torch.zeros_like, "row_offsets gives row 0"),
        ("bitmask", "values", lambda t: t / 0, "NaN or Inf"),
        ("int 3 bits", "meta", torch.zeros_like, "group 0"),
        ("int 3 bits", "weight_packed", lambda t: t[:, :-1], "weight_packed is "),
        ("int 3 bits", "weight_zero_point", lambda t: t[:-1], "weight_zero_point is "),
        ("armor", "pre", lambda t: t[1:], r"pre is \[3, 12, 12\], wanted \[4, 12, 12\]"),
        ("armor, codes", "meta", torch.zeros_like, "group 0"),
    ],
)
def test_damaged_tensors_are_named_and_refused(
    case: str, tensor: str, change: Callable[[torch.Tensor], torch.Tensor], why: str, path: str, backend: Callable[[str], None]
) -> None:
    backend(path)
    packed = CASES[case]()
    damaged = {**packed.tensors, tensor: change(packed.tensors[tensor])}
    with pytest.raises(ValueError, match=why):
        kernel(packed).prepare(damaged, packed.params, packed.shape, torch.float32)


OPS = {"2:4": sparse24_tiled, "bitmask": bitmask_tiled, "int 3 bits": sparse24_int_tiled, "int 4 bits": sparse24_int_tiled}


@pytest.mark.parametrize("case", OPS)
def test_the_tiled_ops_pass_torchs_own_checks(case: str, backend: Callable[[str], None]) -> None:
    backend("tiled")
    packed = CASES[case]()
    p = prepared(packed, torch.float32)
    assert isinstance(p, _sparse.Prepared)
    bias = torch.zeros(packed.shape[0]) if case == "2:4" else None
    args = (torch.randn(2, 3, packed.shape[1]), *p.parts, bias, *p.sizes)
    torch.library.opcheck(OPS[case].linear, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ONE_PER_KIND)
def test_both_paths_compile_without_a_graph_break(case: str, path: str, backend: Callable[[str], None]) -> None:
    backend(path)
    torch.compiler.reset()
    packed = CASES[case]()
    p, module = prepared(packed, torch.float32), kernel(packed)
    run = torch.compile(lambda x: module.linear(x, p), backend="aot_eager", fullgraph=True)
    for tokens in (1, 2, 40):
        x = torch.randn(tokens, packed.shape[1])
        assert torch.equal(run(x), module.linear(x, p))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ONE_PER_KIND)
def test_a_compressed_linear_holds_the_tensors_and_multiplies_by_the_weight(
    case: str, path: str, backend: Callable[[str], None]
) -> None:
    backend(path)
    packed = CASES[case]()
    E = "BF16" if any(t.dtype == BF16 for t in packed.tensors.values()) else "F16"
    options = {"stored": E, "dtype": torch.float32, "bias": True, "device": "cpu"}
    module = CompressedLinear(packed.kind, packed.params, packed.shape, **options)
    assert dict(module.named_buffers()).keys() == packed.tensors.keys()
    for name, t in {**packed.tensors, "bias": torch.full(packed.shape[:1], 0.5)}.items():
        getattr(module, name).data.copy_(t)
    x = inputs(3, packed.shape[1])
    want = in_fp64(packed, x, torch.full(packed.shape[:1], 0.5))
    assert torch.equal(module.dense_weight(), registry.by_kind(packed.kind).dequantize(packed))
    torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-5)  # unprepared, as an offloaded one
    module.prepare()
    assert module.path == path
    torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-5)
    module.to(torch.float64)
    assert module(x.double()).dtype == torch.float64
    assert {name: t.dtype for name, t in module.named_buffers()} == {name: t.dtype for name, t in packed.tensors.items()}

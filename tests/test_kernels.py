"""Kernels of int_grouped: every path against the reference, on awkward shapes."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import compress_kernels
import pytest
import torch
import torch.nn.functional as F
from compress_kernels import bits as bitpack
from compress_kernels import int_grouped
from compress_kernels.int_grouped import cpu_int4, reference, tiled
from hypothesis import given, settings
from hypothesis import strategies as st

Weight = tuple[dict[str, torch.Tensor], dict[str, int], tuple[int, int]]


def random_weight(O: int, I: int, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype = torch.float32) -> Weight:
    """Tensors, params and shape of a weight with random codes, scales in `dtype`, outputs of size about 1."""
    g = torch.Generator().manual_seed(O + I + bits)
    G = 1 if group_size == -1 else I // group_size
    scale = (torch.rand(O, G, generator=g) + 0.5) / (2**bits * I**0.5)
    tensors = {
        "weight_packed": bitpack.pack(torch.randint(0, 1 << bits, (O, I), generator=g, dtype=torch.uint8), bits),
        "weight_scale": scale.to(dtype),
    }
    if not symmetric:
        zero = torch.randint(0, 1 << bits, (O, G), generator=g, dtype=torch.uint8)
        tensors["weight_zero_point"] = bitpack.pack(zero.T, bits).T.contiguous()
    return tensors, {"bits": bits, "group_size": group_size}, (O, I)


def dense(weight: Weight) -> torch.Tensor:
    tensors, params, shape = weight
    return reference.dequantize(
        tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point"), params["bits"], shape
    )


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want.double()).norm() / want.double().norm())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 100), st.integers(0, 9))
def test_fast_decoding_equals_the_definition(bits: int, rows: int, length: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (rows, length), generator=g, dtype=torch.uint8)
    words = bitpack.pack(q, bits)
    assert torch.equal(tiled.decode(words, bits, length), q)
    assert torch.equal(bitpack.unpack(words, bits, length), q)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, False), (8, False)])
def test_dequantized_values_equal_the_reference_bit_for_bit(
    stored: torch.dtype, dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    weight = tensors, params, shape = random_weight(24, 96, bits, 32, symmetric, stored)
    p = int_grouped.prepare(tensors, params, shape, dtype, exact=True)
    words, scale = tensors["weight_packed"], tensors["weight_scale"]
    W = tiled.dequantize(words, scale, p.zero, bits, torch.empty(shape, dtype=dtype))
    assert torch.equal(W, dense(weight).to(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("O", "I", "group_size"), [(1, 17, -1), (7, 51, 17), (33, 64, 32), (40, 96, -1)])
def test_tiled_linear_agrees_with_fp64(O: int, I: int, group_size: int, bits: int, symmetric: bool) -> None:
    weight = tensors, params, shape = random_weight(O, I, bits, group_size, symmetric)
    p = int_grouped.prepare(tensors, params, shape, torch.float32)
    x = torch.randn(3, 5, I, generator=torch.Generator().manual_seed(1))[:, ::2]  # not contiguous
    bias = torch.linspace(-1, 1, O)
    want = F.linear(x.double(), dense(weight).double(), bias.double())
    y = int_grouped.linear(x, p, bias)
    assert y.shape == (3, 3, O)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)  # fp32 sums of up to 96 terms


def test_one_tile_is_the_reference_and_many_tiles_differ_only_in_summation_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors, params, shape = random_weight(200, 256, 4, 64, False)
    x, bias = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)), torch.randn(200)
    p = int_grouped.prepare(tensors, params, shape, torch.float32, exact=True)
    zero = tensors["weight_zero_point"]
    want = reference.linear(x, tensors["weight_packed"], tensors["weight_scale"], zero, 4, shape, bias)
    assert torch.equal(int_grouped.linear(x, p, bias), want)
    monkeypatch.setattr(tiled, "TILE", 256 * 64)  # four tiles, the last one short
    torch.testing.assert_close(int_grouped.linear(x, p, bias), want, rtol=1e-5, atol=1e-6)


def test_no_tokens_give_no_outputs() -> None:
    tensors, params, shape = random_weight(16, 32, 4, 32, True)
    p = int_grouped.prepare(tensors, params, shape, torch.float32)
    assert int_grouped.linear(torch.empty(2, 0, 32), p).shape == (2, 0, 16)


needs_int4pack = pytest.mark.skipif(
    cpu_int4.can_run(4, 32, (16, 32), torch.bfloat16, torch.device("cpu")) is not None,
    reason="torch has no fast int4 kernel for this CPU",
)


@needs_int4pack
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("O", "I", "group_size"), [(16, 32, 32), (48, 128, 64), (80, 256, -1), (1040, 128, 128)])
def test_int4pack_is_close_to_the_reference(
    O: int, I: int, group_size: int, symmetric: bool, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", "int4pack")
    weight = tensors, params, shape = random_weight(O, I, 4, group_size, symmetric, stored)
    p = int_grouped.prepare(tensors, params, shape, torch.bfloat16)
    assert p.path == "int4pack"
    for tokens in (1, 3, 17, cpu_int4.ROWS_OF_X + 1):  # the last one runs tiles
        x = torch.randn(tokens, I, generator=torch.Generator().manual_seed(1)).bfloat16()
        bias = torch.zeros(O, dtype=torch.bfloat16)
        want = F.linear(x.double(), dense(weight).double())
        assert relative(int_grouped.linear(x, p, bias), want) < 1e-2  # bf16 outputs, scales and zeros: 3 * 2^-9


@needs_int4pack
def test_int4pack_repacks_rows_in_pieces_as_it_would_the_whole() -> None:
    tensors, _, shape = random_weight(1104, 64, 4, 32, True)
    q = bitpack.unpack(tensors["weight_packed"], 4, 64).to(torch.int32)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2)
    assert torch.equal(cpu_int4.prepare(tensors["weight_packed"], tensors["weight_scale"], None, shape)[0], whole)


@pytest.mark.parametrize(
    ("bits", "group_size", "shape", "dtype", "device", "why"),
    [
        (4, 32, (16, 64), torch.float32, "cpu", "float32"),
        (3, 32, (16, 64), torch.bfloat16, "cpu", "3 bits"),
        (4, 16, (16, 64), torch.bfloat16, "cpu", "groups of 16"),
        (4, 32, (17, 64), torch.bfloat16, "cpu", "17 x 64"),
        (4, 32, (16, 64), torch.bfloat16, "cuda", "cuda"),
    ],
)
def test_int4pack_says_why_it_cannot_run(
    bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, device: str, why: str
) -> None:
    reason = cpu_int4.can_run(bits, group_size, shape, dtype, torch.device(device))
    assert reason is not None
    assert why in reason


def test_a_fallback_is_recorded_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    int_grouped._say_once.cache_clear()
    tensors, params, shape = random_weight(16, 32, 4, 32, True)
    with caplog.at_level(logging.INFO, logger="compress_kernels"):
        for _ in range(3):
            p = int_grouped.prepare(tensors, params, shape, torch.bfloat16, exact=True)
    assert p.path == "tiled"
    assert p.reasons == dict.fromkeys(("cpu-exact", "int4pack"), "exact results were asked for")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_tiled_op_passes_torchs_own_checks(symmetric: bool) -> None:
    tensors, _, _ = random_weight(16, 32, 4, 32, symmetric)
    zero = None if symmetric else reference.zeros(tensors["weight_zero_point"], 4, 16)
    bias = None if symmetric else torch.zeros(16)
    args = (torch.randn(2, 3, 32), tensors["weight_packed"], tensors["weight_scale"], zero, bias, 4)
    torch.library.opcheck(tiled.linear, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_compile_without_a_graph_break(dtype: torch.dtype) -> None:
    tensors, params, shape = random_weight(32, 64, 4, 32, False, dtype)
    p = int_grouped.prepare(tensors, params, shape, dtype)
    run = torch.compile(lambda x: int_grouped.linear(x, p), backend="aot_eager", fullgraph=True)
    for tokens in (2, 40):
        x = torch.randn(tokens, 64).to(dtype)
        assert torch.equal(run(x), int_grouped.linear(x, p))


def test_the_package_imports_torch_and_itself_only() -> None:
    allowed = {
        "torch",
        "compress_kernels",
        "__future__",
        "collections",
        "contextlib",
        "ctypes",
        "dataclasses",
        "functools",
        "hashlib",
        "itertools",
        "json",
        "logging",
        "math",
        "mmap",
        "os",
        "pathlib",
        "platform",
        "re",
        "statistics",
        "subprocess",
        "tempfile",
        "threading",
        "time",
        "triton",
        "types",
        "typing",
        "weakref",
    }
    root = Path(compress_kernels.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name

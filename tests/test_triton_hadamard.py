"""The Hadamard transform: the definition against the matrix itself, the kernel in Triton's interpreter against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from compress_kernels import hadamard
from compress_kernels.hadamard import matrices, reference

from compress.models.hadamard import Rotation

BASES = {12: 192, 20: 320, 28: 448, 172: 1376}  # order of the base -> n
CLOSE = {torch.float16: 5e-4, torch.bfloat16: 6e-3, torch.float32: 1e-6}  # one rounding (bf16 cut off by the interpreter)


def base_of(order: int) -> torch.Tensor:
    base = matrices.base(order)
    assert base is not None
    assert base.dtype == torch.int8
    assert base.shape == (order, order)
    exact = base.to(torch.int64)
    assert torch.equal(exact @ exact.T, order * torch.eye(order, dtype=torch.int64))
    return base


@pytest.mark.parametrize("n", [1, 2, 64, 256, 4096])
def test_powers_of_two_are_the_rotation_of_the_rotated_checkpoint(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(reference.transform(x), Rotation(n).right(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.transform(reference.transform(x)), x, rtol=1e-12, atol=1e-12)  # its own inverse


@pytest.mark.parametrize(("order", "n"), BASES.items())
def test_tabulated_bases_are_the_rotation_of_the_rotated_checkpoint(order: int, n: int) -> None:
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(reference.transform(x, base_of(order)), Rotation(n).right(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "order"), [(16, 1), (128, 1), (256, 1), (2048, 1), (192, 12), (320, 20), (7168, 28), (2752, 172)])
def test_the_kernel_agrees_with_the_definition_in_fp64(n: int, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("COMPRESS_BACKEND", "triton")
    base = None if order == 1 else base_of(order)
    for dtype, close in CLOSE.items():
        x = torch.randn(2, 3, 2 * n, generator=torch.Generator().manual_seed(n)).to(dtype)[..., :n] * 100
        assert hadamard.can_run(n, base, dtype, x.device) is None
        want = reference.transform(x.double(), base)
        y = hadamard.transform(x, base)
        assert y.shape == x.shape
        assert float((y.double() - want).norm() / want.norm()) < close


def test_the_activation_of_a_gated_layer_is_part_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("COMPRESS_BACKEND", "triton")
    g = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(5, 192, generator=g).half() for _ in range(2))
    want = reference.transform(reference.activated(gate, up).double(), base_of(12))
    y = hadamard.transform(gate, base_of(12), up)
    assert float((y.double() - want).norm() / want.norm()) < 1e-3  # silu is rounded to fp16 before and after the product


def test_the_op_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("COMPRESS_BACKEND", "triton")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half()
    torch.library.opcheck(hadamard._op, (x, None, None), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x: hadamard.transform(x), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), hadamard.transform(x))


def test_nan_stays_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("COMPRESS_BACKEND", "triton")
    x = torch.ones(3, 256, dtype=torch.float16)
    x[1, 7] = math.nan
    y = hadamard.transform(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_intermediate_sizes_of_llamas_have_a_matrix_that_the_kernel_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", "triton")
    for n, order in ((4096, 1), (11008, 172), (14336, 28), (13824, 108), (8960, 140), (5120, 20), (40, 20)):
        base = matrices.base(n)
        assert (1 if base is None else len(base)) == order
        if n // order >= 16:
            assert hadamard.can_run(n, base, torch.float16, torch.device("cpu")) is None


def test_an_order_without_a_matrix_is_named() -> None:
    with pytest.raises(ValueError, match="order 4300: no construction"):
        matrices.base(4 * 25 * 43)
    with pytest.raises(ValueError, match="order 96: it is no power of two"):
        reference.transform(torch.ones(1, 96))
    with pytest.raises(ValueError, match="28 times no power of two"):
        reference.transform(torch.ones(1, 96), base_of(28))


def test_orders_that_a_program_cannot_hold_take_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", "triton")
    for n, why in ((8, "power of two of 8"), (1 << 15, "32768 elements")):
        reason = hadamard.can_run(n, None, torch.float16, torch.device("cpu"))
        assert reason is not None
        assert why in reason
        x = torch.randn(1, n, generator=torch.Generator().manual_seed(0)).half()
        assert torch.equal(hadamard.transform(x), reference.transform(x))

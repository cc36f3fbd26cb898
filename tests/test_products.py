"""Products by oneDNN: the same numbers, gradients too, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, tree

import compress
from compress import products
from compress.products import faster

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As if it paid on this machine, from the first number on; the shapes of what took the detour."""
    taken: list[tuple[int, ...]] = []

    def product(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        taken.append((*x.shape, len(W)))
        return direct(x, W, bias)

    direct = products._product
    monkeypatch.setattr(products, "_product", product)
    monkeypatch.setattr(products, "pays", lambda: True)
    monkeypatch.setattr(products, "_LEAST", 1)
    return taken


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_linear_layers_and_products_are_the_same_numbers(everywhere: list[tuple[int, ...]]) -> None:
    x, W, bias = randn(3, 50, 64), randn(32, 64, seed=1), randn(32, seed=2)
    tall = randn(90, 64, seed=3)
    runs = [
        lambda: torch.nn.functional.linear(x, W), lambda: torch.nn.functional.linear(x, W, bias), lambda: x @ W.T,
        lambda: torch.matmul(tall[::3], W.T), lambda: tall.T @ tall, lambda: torch.mm(tall[:, ::2], W[:, :32].T),
        lambda: randn(90, 32).addmm_(tall, W.T, alpha=-0.5),
    ]  # fmt: skip
    for i, run in enumerate(runs, 1):
        want = run()
        with faster():
            assert near(run(), want)
        assert len(everywhere) == i


def test_gradients_are_the_same_numbers(everywhere: list[tuple[int, ...]]) -> None:
    found = []
    for detour in (False, True):
        x, W, bias = (t.requires_grad_() for t in (randn(3, 20, 64), randn(32, 64, seed=1), randn(32, seed=2)))
        if detour:
            with faster():
                torch.nn.functional.linear(x, W, bias).square().sum().backward()
        else:
            torch.nn.functional.linear(x, W, bias).square().sum().backward()
        found.append((x.grad, W.grad, bias.grad))
    assert len(everywhere) == 3
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert near(b, a)


def test_other_dtypes_vectors_batches_and_taped_products_go_the_usual_way(everywhere: list[tuple[int, ...]]) -> None:
    with faster():
        assert (randn(4, 8).double() @ randn(8, 3).double()).dtype == torch.float64
        assert (randn(4, 8).bfloat16() @ randn(8, 3).bfloat16()).dtype == torch.bfloat16
        assert (randn(4, 8) @ randn(8)).shape == (4,)
        assert (randn(2, 4, 8) @ randn(2, 8, 3)).shape == (2, 4, 3)
        A = randn(4, 8).requires_grad_()
        (A @ randn(8, 3)).sum().backward()
        assert A.grad is not None
    assert not everywhere


def test_a_job_takes_the_detour_and_repeats_its_bytes(tmp_path: Path, everywhere: list[tuple[int, ...]]) -> None:
    data = {"dataset": CALIBRATION, "nsamples": 2, "seqlen": 64}
    for name in ("a", "b"):
        compress.quantize(EXAMPLE, "gptq", tmp_path / name, bits=4, group_size=32, **data)
    assert len(everywhere) > 100
    assert tree(tmp_path / "a") == tree(tmp_path / "b")

"""SVD-LLM's and ASVD's official numbers (docs/parity.md) on three linears of the shipped checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, ROOT

from compress import calibration
from compress.methods import _lowrank
from compress.methods._budget import rank_of
from compress.stats import InputStats
from compress.types import Stat

GOLDEN = json.loads((ROOT / "tests" / "golden" / "factorize_stories15M.json").read_text())
NONE = torch.empty(0, dtype=torch.int64)


@pytest.fixture(scope="module")
def observed() -> dict[str, tuple[torch.Tensor, InputStats, InputStats]]:
    """Weight, statistics of all windows and of the first four, of the golden linears in the dense model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    calib = calibration.load(CALIBRATION, tokenizer, nsamples=16, seqlen=256, seed=None, vocab=32000)
    assert calib.sha256 == GOLDEN["problem"]["sha256"]
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    found = {}
    for name in GOLDEN["layers"]:
        module = model.get_submodule(name)
        both = [InputStats(Stat.ABSMEAN | Stat.GRAM, module.in_features, n * 256, -1) for n in (16, 4)]
        found[name] = (module.weight.detach(), *both)

        def hook(_: Any, args: Any, both: list[InputStats] = both) -> None:
            both[0].update(args[0])
            if both[1].tokens < 4 * 256:
                both[1].update(args[0])

        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for window in calib.tokens:
            model(window.view(1, -1))
    return found


def check(found: _lowrank.Factors, W: torch.Tensor, C: torch.Tensor, want: dict[str, Any]) -> None:
    L, W = found.dense(), W.double()
    E = W - L
    error = float(((E @ C) * E).sum() / ((W @ C) * W).sum())
    assert float(L.norm()) == pytest.approx(want["norm"], rel=2e-5)
    assert float(E.norm() / W.norm()) == pytest.approx(want["weight_error"], rel=2e-5)
    assert error == pytest.approx(want["output_error"], rel=1e-4)
    assert found.error == pytest.approx(want["output_error"], rel=1e-4)
    sample = L[:: max(1, L.shape[0] // 6), :: max(1, L.shape[1] // 5)].flatten()[:24]
    wanted = torch.tensor(want["sample"], dtype=torch.float64)
    assert float((sample - wanted).norm() / wanted.norm()) < 1e-3  # there in float32, through an inverse


@pytest.mark.parametrize("name", list(GOLDEN["layers"]))
def test_whitening_and_update_are_those_of_the_official_code(name: str, observed: dict[str, Any]) -> None:
    golden, (W, stats, first) = GOLDEN["layers"][name], observed[name]
    shape = (W.shape[0], W.shape[1])
    assert rank_of(int(0.8 * W.numel()), 0, shape) == golden["rank"] == golden["asvd"]["rank"]
    C = stats.hessian().double()
    found = _lowrank.Problem(W, _lowrank.moment(C)).fit(NONE, golden["rank"])
    check(found, W, C, golden["svdllm"])
    C = first.hessian().double()
    check(_lowrank.for_outputs(W, _lowrank.moment(C, 0.0), found.A), W, C, golden["update"])


@pytest.mark.parametrize("name", list(GOLDEN["layers"]))
def test_asvd_is_the_exact_form_of_the_official_codes_randomised_svd(name: str, observed: dict[str, Any]) -> None:
    golden, (W, stats, _) = GOLDEN["layers"][name]["asvd"], observed[name]
    scale = stats.absmean().double() ** 0.5 + 1e-6
    found = _lowrank.Problem(W, _lowrank.moment(scale.square())).fit(NONE, golden["rank"])
    assert found.error**0.5 == pytest.approx(golden["best_scaled_error"], rel=1e-5)
    assert 0.93 * golden["scaled_error"] < found.error**0.5 < golden["scaled_error"]
    E = W.double() - found.dense()
    assert float(E.norm() / W.norm()) == pytest.approx(golden["weight_error"], rel=0.08)

"""GWQ: what is kept is exact, what is rounded fits the rest, nothing is kept at random, and loaders cannot lose it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, VALID, Outcome, python

import compress
from compress.audit import unpack, verify, verify_deep
from compress.checkpoint import manifest
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.formats import int_grouped_outliers
from compress.methods import _outliers, gwq
from compress.methods._quantizer import Grid, fit, round_to
from compress.types import Block

DATA: dict[str, Any] = {"dataset": CALIBRATION, "nsamples": 2, "seqlen": 128}
NAME = "model.layers.3.mlp.down_proj"
SHAPE = (288, 768)


def entry(folder: Path, name: str = NAME) -> dict[str, Any]:
    found: dict[str, Any] = manifest.read(folder)["linears"][name]
    return found


def weights(folder: Path, name: str = NAME) -> tuple[torch.Tensor, int_grouped_outliers.Unpacked]:
    """The dense weight of an artifact's linear, and its parts."""
    from compress.audit import _packed

    reader = CheckpointReader(folder)
    return unpack(reader, name, entry(folder, name)), int_grouped_outliers.unpack(_packed(reader, name, entry(folder, name)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gwq") / "out"
    compress.quantize(EXAMPLE, "gwq", out, **DATA)
    return out


# -- the choice of what is kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "size", "k"), [(0.01, 100, 1), (0.07, 100, 7), (0.01, 101, 2), (0, 50, 0), (1, 50, 50)])
def test_the_count_is_exact(fraction: float, size: int, k: int) -> None:
    assert _outliers.count(fraction, size) == k


def test_the_largest_scores_are_taken_and_of_equals_the_first() -> None:
    score = torch.tensor([[1.0, 3.0, 2.0], [2.0, 0.0, 2.0]])
    assert _outliers.top(score, 3).tolist() == [1, 2, 3]
    assert _outliers.top(score, 6).tolist() == [1, 2, 3, 5, 0, 4]
    assert _outliers.top(score, 0).tolist() == []
    assert _outliers.top(torch.zeros(4, 4), 3).tolist() == [0, 1, 2]


def test_the_kept_weights_are_those_of_largest_gradient_exactly(plain: Path, pico: Callable[..., Path]) -> None:
    """Against one backward pass of the whole model per window."""
    from transformers import AutoModelForCausalLM

    from compress.calibration import load_tokenizer, windows

    tokens = windows(CALIBRATION.read_text(), load_tokenizer(EXAMPLE), 2, 128, None, "text")
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    W = model.get_submodule(NAME).weight
    score = torch.zeros_like(W)
    for row in tokens:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).backward()
        assert W.grad is not None
        score += 3 * W.grad.abs()  # a positive factor of the loss changes nothing
    k = _outliers.count(0.01, W.numel())
    want = set(_outliers.top(score, k).tolist())
    W_hat, parts = weights(plain)
    assert len(parts.index) == k == entry(plain)["params"]["outliers"]
    assert len(want & set(parts.index.tolist())) >= 0.999 * k  # float noise may swap the last ones
    stored = CheckpointReader(EXAMPLE).read(f"{NAME}.weight")
    assert torch.equal(W_hat.view(-1)[parts.index].half(), stored.view(-1)[parts.index])


@pytest.mark.parametrize("score", gwq.SCORES)
def test_every_score_keeps_the_exact_count_and_is_reproducible(score: str, tmp_path: Path) -> None:
    for out in ("a", "b"):
        compress.quantize(EXAMPLE, "gwq", tmp_path / out, score=score, fraction=0.003, **DATA)
    (W, parts), (again, _) = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert torch.equal(W, again)
    assert len(parts.index) == _outliers.count(0.003, W.numel())
    assert verify(tmp_path / "a") == []
    assert verify_deep(tmp_path / "a", EXAMPLE) == []


def test_the_global_share_is_exact_over_the_model_and_follows_the_scores(tmp_path: Path) -> None:
    compress.quantize(EXAMPLE, "gwq", tmp_path / "out", scope="global", **DATA)
    linears = manifest.read(tmp_path / "out")["linears"]
    counts = {n: e["params"]["outliers"] for n, e in linears.items()}
    sizes = {n: e["shape"][0] * e["shape"][1] for n, e in linears.items()}
    assert sum(counts.values()) == _outliers.count(0.01, sum(sizes.values()))
    shares = {n: counts[n] / sizes[n] for n in counts}
    assert min(shares.values()) < 0.009 < 0.011 < max(shares.values()) < 0.1602
    rows = manifest.read(tmp_path / "out")["search"]
    limited = {f"model.layers.{r['block']}.{n}" for r in rows for n in r.get("at_limit", [])}
    assert limited == {n for n, share in shares.items() if share > 0.16}


def test_settling_finds_the_threshold_that_sorting_finds() -> None:
    g = torch.Generator().manual_seed(0)
    config = gwq.Config(scope="global", fraction=0.05)
    sizes = {"a": 400, "b": 1000, "c": 240}
    scores = {n: (torch.rand(s, generator=g) * 8).round() / 8 * 10.0 ** -i for i, (n, s) in enumerate(sizes.items())}  # with ties
    blocks = [{}, {}]
    for i, (name, score) in enumerate(scores.items()):
        index = _outliers.top(score, len(score))
        blocks[i // 2] |= {name: index, f"score:{name}": score[index], f"numel:{name}": torch.tensor(len(score))}
    found = gwq.settle(lambda: iter(blocks), config)
    counts = {name: p["outliers"] for block in found for name, p in block.items()}
    ordered = torch.cat(list(scores.values())).sort(descending=True).values
    assert sum(counts.values()) == 82
    for name, score in scores.items():
        assert int((score > ordered[81]).sum()) <= counts[name] <= int((score >= ordered[81]).sum())


def test_a_linear_without_gradient_keeps_its_largest_weights_and_says_so() -> None:
    W = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    reducer = gwq.Located(Block(0, {"fc": W}, {}, ()), gwq.Config(fraction=0.01))
    found = reducer.result()
    assert set(found) == {"fc", "unseen:fc"}
    assert found["fc"].tolist() == W.abs().view(-1).argsort(descending=True)[:11].tolist()


# -- the rest --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("second", [True, False])
def test_the_others_are_on_a_grid_of_their_own_range(symmetric: bool, dtype: torch.dtype, second: bool) -> None:
    g = torch.Generator().manual_seed(1)
    W = torch.randn(40, 64, generator=g) * 0.02
    W[::3, ::7] *= 30
    kept = W.abs() > 0.1
    grid = Grid(4, 16, symmetric, dtype)
    fitted = _outliers.fit_others(W, kept, grid, None, dtype if second else None)
    v = W.masked_fill(kept, 0.0)
    error = (round_to(v.view(40, 4, 16), fitted.scale, fitted.zero, grid).view_as(W) - v).abs()[~kept]
    s = fitted.scale.repeat_interleave(16, 1)[~kept]
    # half a step; the second level may cut up to half a step of its own off the range's ends
    assert float((error / s).max()) < (2.0 if second else 0.75)
    full = fit(W, grid)[0]
    assert bool((fitted.scale <= full * (1.6 if second else 1.001)).all())
    assert float(fitted.scale.median()) < float(full.median())


def test_the_rest_is_rounded_by_the_book(tmp_path: Path) -> None:
    """Group by group in float64, as docs/gwq.md describes it, without clipping and without the second level."""
    compress.quantize(EXAMPLE, "gwq", tmp_path / "out", clip=False, second_level="off", **DATA)
    W_hat, parts = weights(tmp_path / "out", "model.layers.0.self_attn.k_proj")
    W = CheckpointReader(EXAMPLE).read("model.layers.0.self_attn.k_proj.weight").double()
    kept = _outliers.mask(parts.index, W.shape)
    assert parts.zero is not None
    for o in range(0, 288, 37):
        for k in range(18):
            at = slice(16 * k, 16 * k + 16)
            others = W[o, at][~kept[o, at]]
            lo, hi = min(float(others.min()), 0.0), max(float(others.max()), 0.0)
            scale = float(torch.tensor((hi - lo) / 7, dtype=torch.float32).half())
            zero = min(max(round(-lo / scale), 0), 7)
            assert float(parts.scale[o, k]) == scale
            assert int(parts.zero[o, k]) == zero
            want = ((others / scale).round() + zero).clamp(0, 7)
            assert torch.equal(parts.q[o, at][~kept[o, at]].double(), want)
            assert torch.equal(W_hat[o, at][~kept[o, at]].double(), (want - zero) * scale)
            assert torch.equal(W_hat[o, at][kept[o, at]].double(), W[o, at][kept[o, at]])


def test_quantized_scales_are_within_half_a_step_and_skip_empty_groups() -> None:
    g = torch.Generator().manual_seed(0)
    scale = torch.rand(50, 6, generator=g) * 0.01 + 0.005
    empty = torch.zeros(50, 6, dtype=torch.bool)
    empty[3, 2] = True
    scale[3, 2] = 1e-10
    place, offset, step = _outliers.quantize_scales(scale, empty, torch.float16)
    found = int_grouped_outliers.reference.scales(place.round().to(torch.uint8), offset, step)
    room = step.float().repeat_interleave(16, 0)[:50] * 0.51 + 2e-6
    assert bool(((found - scale).abs() <= room)[~empty].all())
    assert float(offset[0, 2]) > 0.004
    place, offset, step = _outliers.quantize_scales(torch.full((16, 1), 0.25), torch.zeros(16, 1, dtype=torch.bool), torch.float16)
    assert torch.equal(int_grouped_outliers.reference.scales(place.to(torch.uint8), offset, step), torch.full((16, 1), 0.25))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_scales_cost_little_at_any_width(bits: int, tmp_path: Path) -> None:
    """Rounded to the nearest only, half of the scales would cut their range, which is most of the error at 8 bits."""
    for second in ("on", "off"):
        compress.quantize(EXAMPLE, "gwq", tmp_path / second, bits=bits, second_level=second, score="magnitude", **DATA)
    assert entry(tmp_path / "on")["error"] < (1.6 if bits == 8 else 1.06) * entry(tmp_path / "off")["error"]


def test_fraction_0_is_plain_rounding_and_loads_in_stock_loaders(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 3, "group_size": 32}
    compress.quantize(EXAMPLE, "gwq", tmp_path / "gwq", fraction=0, second_level="off", clip=False, **options, **DATA)
    compress.quantize(EXAMPLE, "rtn", tmp_path / "rtn", **options)
    files = [f / "model.safetensors" for f in (tmp_path / "gwq", tmp_path / "rtn")]
    assert files[0].read_bytes() == files[1].read_bytes()
    config = json.loads((tmp_path / "gwq" / "config.json").read_text())
    assert "format" not in config["quantization_config"]["config_groups"]["group_0"]


def test_fraction_1_keeps_every_weight(tmp_path: Path) -> None:
    compress.quantize(EXAMPLE, "gwq", tmp_path / "out", fraction=1, **DATA)
    W, _ = weights(tmp_path / "out")
    assert torch.equal(W.half(), CheckpointReader(EXAMPLE).read(f"{NAME}.weight"))
    assert entry(tmp_path / "out")["error"] == 0


def test_average_bits_are_the_formula_s(plain: Path) -> None:
    O, I = SHAPE
    rho = entry(plain)["params"]["outliers"] / (O * I)
    side = 32 * rho + 32 * (O + 1) / (O * I)
    words = 2 * 64 / (O * I)  # weight_shape
    assert entry(plain)["bits"] == pytest.approx(3 + (3 + 3) / 16 + 2 * 16 / (16 * 16) + side + words, abs=1e-4)
    # SpQR's own count, with a 3-bit zero that is quantized once more: 3.945
    assert pytest.approx(3.945) == 3 + (3 + 3) / 16 + (16 + 16) * 2 / (16 * 16) + 32 * 0.01


# -- quality mode ----------------------------------------------------------------------------------------------------------


def test_compensation_never_loses_to_the_plain_mode_and_keeps_compensated_weights(tmp_path: Path) -> None:
    compress.quantize(EXAMPLE, "gwq", tmp_path / "out", quality=True, **DATA)
    rows = [r for block in manifest.read(tmp_path / "out")["search"] for r in block["hessian"]]
    assert len(rows) == 42
    assert all(r["loss"] <= r["rtn_loss"] for r in rows)
    assert sum(r["loss"] for r in rows) < 0.7 * sum(r["rtn_loss"] for r in rows)
    W_hat, parts = weights(tmp_path / "out")
    assert bool(torch.isfinite(parts.value).all())
    stored = CheckpointReader(EXAMPLE).read(f"{NAME}.weight").float()
    moved = (W_hat - stored).view(-1)[parts.index].abs()
    assert 0 < float(moved.max()) < 0.2  # compensated, and still the same weights
    assert verify(tmp_path / "out") == []


def _perplexity(folder: Path) -> float:
    return compress.evaluate(folder, text=VALID, windows=24, batch_size=8)["perplexity"].value


def test_gradients_locate_better_than_chance_and_compensation_helps(tmp_path: Path) -> None:
    """The paper's claim in miniature: at equal bits, kept by gradient < kept at random < no weight kept and no small groups."""
    found = {}
    jobs: dict[str, dict[str, Any]] = {
        "random": {"score": "random"}, "gradient": {"nsamples": 16}, "error": {"score": "abs-ge", "nsamples": 16},
        "quality": {"quality": True, "nsamples": 16},
    }  # fmt: skip
    for name, options in jobs.items():
        compress.quantize(EXAMPLE, "gwq", tmp_path / name, **{**DATA, **options})
        found[name] = _perplexity(tmp_path / name)
    compress.quantize(EXAMPLE, "rtn", tmp_path / "rtn", bits=3, group_size=32)
    found["rtn"] = _perplexity(tmp_path / "rtn")
    assert found["quality"] < found["gradient"] < found["random"] < found["rtn"]
    assert found["error"] < found["gradient"]


# -- loading ---------------------------------------------------------------------------------------------------------------

STOCK = """
import sys
sys.modules["compress"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("LOADED")
"""


def test_a_stock_loader_refuses_it_and_never_drops_the_outliers(plain: Path) -> None:
    done = python(STOCK, plain)
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    assert "compress-int_grouped_outliers" in done.stderr


def test_our_loader_and_the_registered_one_give_the_dense_export_s_logits(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress.quantize(EXAMPLE, "gwq", tmp_path / "dense", format="dense", **DATA)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    ids = torch.tensor([[1, 9038, 2501, 263, 931, 727]])
    ours = compress.load(plain, dtype=torch.float32, exact=True)
    kinds = {m.path for m in ours.modules() if hasattr(m, "path")}
    assert kinds == {"tiled"}
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    compress.register()
    registered = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.no_grad():
        want, got, again = (m(ids).logits for m in (dense, ours, registered))
    assert float((got - want).abs().max() / want.abs().max()) < 2e-3  # the export is rounded to the checkpoint's float16
    assert torch.allclose(again, got, atol=1e-4)


def test_inspect_says_what_it_is_and_where_it_loads(plain: Path, cli: Callable[..., Outcome]) -> None:
    shown = cli("inspect", plain)
    assert "refuses compress-int_grouped_outliers on purpose" in shown.out
    assert "3.917 bits per weight" in shown.out


def test_a_damaged_side_car_is_found_and_refused(plain: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    bad = Path(shutil.copytree(plain, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors[f"{NAME}.outlier_indptr"][5] += 1000
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    facts = json.loads((bad / "manifest.json").read_text())
    facts["files"] = manifest.file_table(bad)  # as if the hashes had been made after the damage
    (bad / "manifest.json").write_text(json.dumps(facts))
    assert any("outlier_indptr" in problem for problem in verify(bad))
    done = cli("generate", bad, "--prompt", "Once")
    assert done.code == 1
    assert NAME in done.err
    assert "Traceback" not in done.err


# -- options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--fraction", "1.5"], "0..1"), (["--fraction", "-0.1"], "0..1"), (["--bits", "5"], "--bits"), (["--score", "abz"], "abs"),
        (["--group-size", "24"], "multiples of 16"), (["--samples", "0"], "--samples"), (["--scope", "row"], "--scope"),
        (["--scope", "global", "--score", "magnitude"], "gradient score"), (["--second-level", "maybe"], "--second-level"),
        (["--format", "awq"], "cannot hold int_grouped_outliers"), (["--group-size", "128"], "groups of 128"),
    ],
)  # fmt: skip
def test_wrong_options_are_usage_errors(options: list[str], why: str, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    done = cli("quantize", EXAMPLE, "-m", "gwq", "--dataset", CALIBRATION, *options, "-o", tmp_path / "out")
    assert done.code == 2, done.err
    assert why in done.err
    assert not (tmp_path / "out").exists()


def test_a_weight_too_large_for_16_bits_is_an_error_that_names_it(pico: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 60)
    with pytest.raises(CompressError, match=r"mlp\.up_proj.*does not fit"):
        compress.quantize(model, "gwq", tmp_path / "out", score="magnitude", dataset=text, nsamples=1, seqlen=16)

"""D-Pruner: the score is the formula's, gradients are the whole model's, masks are exact and lie on the original weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, EXAMPLE, VALID, Outcome, tree

import compress
from compress.audit import unpack, verify, verify_deep
from compress.calibration import BUILTIN
from compress.checkpoint import manifest
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.methods import _solvers, dpruner
from compress.methods._masks import keep_highest
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView
from compress.pipeline import layout
from compress.pipeline.blocks import Blocks
from compress.pipeline.descent import Descent
from compress.pipeline.reverse import Reverse
from compress.stats import InputStats
from compress.types import Block, Progress, Stat

NAME = "model.layers.1.mlp.down_proj"
PLAIN: dict[str, Any] = {"lam": 0.0, "general_weight": 0.0}  # the domain's gradients alone
PAPER: dict[str, Any] = {"c1": 1.0, "c2": 5e-4, "c3": 1.0, "general_weight": 0.0}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def texts(folder: Path) -> dict[str, Any]:
    """A general and a domain text, and windows that fit the pico models."""
    general, domain = folder / "general.txt", folder / "domain.txt"
    general.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    domain.write_text("0123 + 4567 = 4690; 890 - 12 = 878. " * 30)
    return {"dataset": general, "domain_dataset": domain, "nsamples": 4, "seqlen": 24}


def weight(folder: Path, name: str = NAME) -> torch.Tensor:
    return unpack(CheckpointReader(folder), name, manifest.read(folder)["linears"][name])


def samples(steps: int, O: int = 6, I: int = 8, T: int = 5) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """(x, dy) of a linear in every sample, and the gradients that they make."""
    pairs = [(randn(T, I, seed=2 * n), randn(T, O, seed=2 * n + 1) * 0.01) for n in range(steps)]
    return pairs, [dy.T @ x for x, dy in pairs]


def score(W: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], G: torch.Tensor | None, **config: Any) -> torch.Tensor:
    kept = {} if G is None else {"general:fc": G}
    reducer = dpruner.reducer(Block(0, {"fc": W}, {}, (("fc",),), survey=kept), dpruner.Config(**config))
    assert reducer is not None
    for x, dy in pairs:
        reducer.add("fc", x, dy)
    return reducer.result()["score:fc"]


# -- the score (T20, T21) --------------------------------------------------------------------------------------------------


def test_without_the_penalty_the_score_is_the_domain_s_expansion() -> None:
    W = randn(6, 8, seed=90) * 0.3
    pairs, grads = samples(3)
    want = sum(((g * W) + 0.5 * (g * W).square() + 0.25 * W**3).abs() for g in grads)
    assert isinstance(want, torch.Tensor)
    options = {"c1": 1.0, "c2": 0.5, "c3": 0.25, "general_weight": 0.0}
    assert torch.allclose(score(W, pairs, None, lam=0.0, **options), want, rtol=1e-5)
    assert torch.allclose(score(W, pairs, torch.zeros(6, 8), lam=0.7, **options), want, rtol=1e-5)


def test_the_penalty_is_the_formula_s() -> None:
    W, G = randn(6, 8, seed=90) * 0.3, randn(6, 8, seed=91).square() * 100
    pairs, grads = samples(3)
    penalised = [g + 0.5 * 2 * 0.2**2 * 3.0 * G * g.square() for g in grads]
    want = sum(((g * W) + 0.1 * (g * W).square() + 2 * W**3).abs() for g in penalised)
    assert isinstance(want, torch.Tensor)
    found = score(W, pairs, G, lam=0.5, lr=0.2, reg_scale=3.0, c1=1.0, c2=0.1, c3=2.0, general_weight=0.0)
    assert torch.allclose(found, want, rtol=1e-5)
    assert not torch.allclose(found, score(W, pairs, G, lam=0.0, c1=1.0, c2=0.1, c3=2.0, general_weight=0.0), rtol=1e-3)


def test_one_step_of_first_order_ranks_by_the_product_of_gradient_and_weight() -> None:
    W = randn(6, 8, seed=90)
    pairs, (g,) = samples(1)
    found = score(W, pairs, None, c1=1.0, c2=0.0, c3=0.0, **PLAIN)
    assert found.view(-1).argsort().tolist() == (g * W).abs().view(-1).argsort().tolist()


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_step_is_one_backward_pass_of_its_windows_mean_loss(batch: int) -> None:
    W = randn(6, 8, seed=90)
    pairs, grads = samples(5)
    steps = [torch.stack(grads[i : i + batch]).mean(0) for i in range(0, 5, batch)]
    want = sum((g * W + 0.1 * (g * W).square() + W**3).abs() for g in steps)
    assert isinstance(want, torch.Tensor)
    assert torch.allclose(score(W, pairs, None, batch=batch, c1=1.0, c2=0.1, c3=1.0, **PLAIN), want, rtol=1e-5)


def test_steps_are_the_samples_also_of_a_linear_that_misses_some() -> None:
    """An expert that sees no token of the second window; its step's mean counts that window."""
    W = {"q": randn(6, 8, seed=90), "expert": randn(6, 8, seed=91)}
    pairs, grads = samples(3)
    reducer = dpruner.Important(Block(0, W, {}, ()), dpruner.Config(batch=2, c1=1.0, c2=0.0, c3=0.0, **PLAIN))
    for n, pair in enumerate(pairs):
        reducer.add("q", *pair)
        if n != 1:
            reducer.add("expert", *pair)
    found = reducer.result()
    for name, steps in (("q", [(grads[0] + grads[1]) / 2, grads[2]]), ("expert", [grads[0] / 2, grads[2]])):
        want = sum((g * W[name]).abs() for g in steps)
        assert isinstance(want, torch.Tensor)
        assert torch.allclose(found[f"score:{name}"], want, rtol=1e-5)


def test_general_weight_moves_the_ranking_from_the_domain_s_to_general_text_s() -> None:
    W, G = randn(6, 8, seed=90), randn(6, 8, seed=91).square() * 1e6
    pairs, _ = samples(2)
    alone = score(W, pairs, None, c1=1.0, c2=0.0, c3=0.0, **PLAIN)
    mixed = score(W, pairs, G, c1=1.0, c2=0.0, c3=0.0, lam=0.0, general_weight=2.0)
    assert torch.allclose(mixed / alone.mean(), alone / alone.mean() + 2 * G / G.mean(), rtol=1e-5)
    most = score(W, pairs, G, c1=1.0, c2=0.0, c3=0.0, lam=0.0, general_weight=1e9)
    assert most.view(-1).argsort().tolist() == G.view(-1).argsort().tolist()


def test_a_linear_without_gradient_is_scored_by_general_text_or_by_magnitude() -> None:
    W, G = randn(6, 8, seed=90), randn(6, 8, seed=91).square()
    block = Block(0, {"fc": W}, {}, (), survey={"general:fc": G})
    found = dpruner.Important(block, dpruner.Config(lam=0.1)).result()
    assert torch.equal(found["score:fc"], G)
    assert "unseen:fc" in found
    zero = [(torch.zeros(5, 8), torch.zeros(5, 6))]
    assert torch.equal(score(W, zero, None, **PLAIN), W.square())


# -- step 1 (T22) ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [True, False])
def test_general_importance_is_sparsegpt_s_saliency(diagonal: bool) -> None:
    W = randn(6, 8)
    X = torch.diag(torch.arange(1.0, 9.0)) if diagonal else randn(40, 8, seed=3)
    stats = InputStats(Stat.GRAM, 8, len(X), 0)
    stats.update(X)
    kept, seen = dpruner.survey(Block(0, {"fc": W}, {}, (("fc",),)), {"fc": stats}, dpruner.Config(), torch.float16)
    H = stats.hessian()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(8)
    U = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True).diagonal().float()
    assert torch.allclose(kept["general:fc"], W.square() / U.square(), rtol=1e-4)  # fewer than 128 columns: nothing moved yet
    if diagonal:
        assert torch.allclose(kept["general:fc"], W.square() * damped.diagonal(), rtol=1e-4)
    assert int((seen["fc"] == 0).sum()) == 24
    assert seen["fc"].dtype == torch.float16


# -- streamed gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_streamed_scores_equal_those_of_the_whole_model(batch: int, pico: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = pico("llama")
    config = dpruner.Config(lam=50.0, reg_scale=1.0, batch=batch, c1=1.0, c2=0.3, c3=1e-3, general_weight=0.0)
    tokens = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(1))
    skeleton = Skeleton(load_config(folder))
    view = CheckpointView(CheckpointReader(folder), skeleton)
    plan = layout.make(skeleton, view, config, layout.pick("prune", None), ())
    shapes = {n: t.shape for n, t in plan.targets.items()}
    G = {n: randn(*shape, seed=i).square() for i, (n, shape) in enumerate(shapes.items())}

    def general(index: int) -> dict[str, torch.Tensor]:
        prefix = skeleton.prefix(index)
        return {f"general:{n.removeprefix(prefix)}": g for n, g in G.items() if n.startswith(prefix)}

    blocks, make = Blocks(skeleton, view, "cpu", torch.float64), partial(dpruner.reducer, config=config)
    walk = Reverse(blocks, plan, tokens, [make], tmp_path / "reverse", None, surveyed=general)  # type: ignore[list-item]
    walk.run()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    want = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
    for rows in tokens.split(batch):
        model.zero_grad()
        logits = model(rows, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.reshape(-1, 128), rows[:, 1:].reshape(-1)).backward()
        for name in want:
            W = model.get_submodule(name).weight
            assert W.grad is not None
            g = W.grad + config.penalty * G[name] * W.grad.square()
            want[name] += (g * W + 0.3 * (g * W).square() + 1e-3 * W**3).abs().detach()
    for index in range(2):
        for key, value in walk.result(index).items():
            if key.startswith("score:"):
                reference = want[skeleton.prefix(index) + key.removeprefix("score:")]
                assert float((value - reference).norm() / reference.norm()) < 1e-5  # norms and sums keep fp32's digits


# -- training mode ---------------------------------------------------------------------------------------------------------


def trained_whole(
    folder: Path, tokens: torch.Tensor, G: dict[str, torch.Tensor], config: dpruner.Config, blocks: str, turned: bool
) -> dict[str, torch.Tensor]:
    """I (O, I) of every linear that G names: LOMO on all `blocks` in double precision; `turned` weights are (I, O)."""
    from transformers import AutoModelForCausalLM

    schedule = dpruner.training(config)
    assert schedule is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    each = -(-len(tokens) // schedule.batch)
    I = {n: torch.zeros_like(g, dtype=torch.float64) for n, g in G.items()}
    params = {n: p for n, p in model.named_parameters() if n.startswith(blocks)}
    for step in range(schedule.epochs * each):
        epoch, number = divmod(step, each)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(epoch))
        rows = tokens[order[number * schedule.batch : (number + 1) * schedule.batch]]
        lr = schedule.rate(step + 1, schedule.epochs * each)
        model.zero_grad()
        logits = model(rows, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1)).backward()
        with torch.no_grad():
            grads = {n: p.grad for n, p in params.items() if p.grad is not None}
            for name, g in G.items():
                W, dW = (t[f"{name}.weight"].T if turned else t[f"{name}.weight"] for t in (params, grads))
                dW += config.penalty_at(lr) * g * dW.square()
                I[name] += (config.c1 * dW * W + config.c2 * (dW * W).square() + config.c3 * W**3).abs()
            norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
            for name, p in params.items():
                p -= lr * min(1.0, schedule.clip / (norm + 1e-6)) * grads[name]
    return I


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_streamed_training_is_that_of_the_whole_model(family: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    folder = pico(family)
    config = dpruner.Config(
        mode="train", lr=0.5, clip=0.7, epochs=2, batch=2, warmup=0.3, lam=50.0, reg_scale=1.0, c1=1.0, c2=0.3, c3=1e-3,
        general_weight=0.0,
    )  # fmt: skip
    tokens = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(1))
    skeleton = Skeleton(load_config(folder))
    view = CheckpointView(CheckpointReader(folder), skeleton)
    plan = layout.make(skeleton, view, config, layout.pick("prune", None), ())
    G = {n: randn(*t.shape, seed=i).square() for i, (n, t) in enumerate(plan.targets.items())}

    def general(index: int) -> dict[str, torch.Tensor]:
        prefix = skeleton.prefix(index)
        return {f"general:{n.removeprefix(prefix)}": g for n, g in G.items() if n.startswith(prefix)}

    schedule = dpruner.training(config)
    assert schedule is not None
    walk = Descent(
        Blocks(skeleton, view, "cpu", torch.float64), plan, tokens, schedule,
        lambda block, state: dpruner.learner(block, config, state), tmp_path / "reverse", None, surveyed=general,
    )  # fmt: skip
    walk.run()
    assert not (tmp_path / "reverse" / "steps").exists()
    want = trained_whole(folder, tokens, G, config, skeleton.path, family == "gpt2")
    for index in range(2):
        for key, value in walk.result(index).items():
            if key.startswith("score:"):
                full = f"{skeleton.prefix(index)}{key.removeprefix('score:')}"
                assert float((value - want[full]).norm() / want[full].norm()) < 1e-4, key  # norms and sums are fp32


def test_at_a_rate_of_zero_training_stands_still(pico: Callable[..., Path], tmp_path: Path) -> None:
    model, data = pico("llama", torch.bfloat16), texts(tmp_path)
    compress.prune(model, "dpruner", tmp_path / "still", c1=1.0, lr=0.0, **data)
    compress.prune(model, "dpruner", tmp_path / "train", c1=1.0, lr=0.0, mode="train", epochs=1, **data)
    compress.prune(model, "dpruner", tmp_path / "moved", c1=1.0, lr=3.0, mode="train", epochs=3, clip=0.0, **data)
    still, train, moved = (weight(tmp_path / name) for name in ("still", "train", "moved"))
    assert float((still == train).float().mean()) > 0.999  # sums in another order
    assert float((still == moved).float().mean()) < 0.99
    kept = moved != 0
    assert torch.equal(moved[kept], CheckpointReader(model).read(f"{NAME}.weight")[kept].float())  # of the original weights


@pytest.mark.parametrize("stop", [("training", 2), ("write", 3), ("write", 4)])
def test_a_killed_training_goes_on_to_the_same_bytes(
    stop: tuple[str, int], pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.pipeline.resume import Kept

    model, data = pico("llama"), texts(tmp_path)
    options: dict[str, Any] = {"mode": "train", "lr": 0.5, "epochs": 2, "batch": 3, "c1": 1.0}
    compress.prune(model, "dpruner", tmp_path / "whole", **data, **options)
    written, write = [], Kept.write

    def watched(kept: Kept, index: int, tensors: dict[str, torch.Tensor]) -> None:
        write(kept, index, tensors)
        if kept.folder.name == "steps":
            written.append(index)
            if stop == ("write", len(written)):
                raise KeyboardInterrupt

    def watch(p: Progress) -> None:
        if stop == ("blocks" if p.error is not None else p.what, p.block):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", watched)
        with pytest.raises(KeyboardInterrupt):
            compress.prune(model, "dpruner", tmp_path / "out", **data, **options, progress=watch)
    assert compress.prune(model, "dpruner", tmp_path / "out", **data, **options).resumed
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_training_that_diverges_is_said(pico: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="NaN or Inf") as error:
        compress.prune(pico("llama"), "dpruner", tmp_path / "out", mode="train", lr=1e12, lam=4e-10, clip=0.0, **texts(tmp_path))
    assert "smaller --lr" in str(error.value.hint)


# -- masks (T23, T24) ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "width"), [(0.5, 8), (0.52, 8), (0.3, 7), (0.37, 40)])
def test_the_share_holds_in_every_block_of_columns_and_exactly_in_the_matrix(share: float, width: int) -> None:
    values = randn(9, 40).abs()
    mask = dpruner.keep_by_columns(values, share, width)
    assert int((~mask).sum()) == int(share * 360 + 1e-6)
    for start in range(0, 40, width):
        part, chosen = values[:, start : start + width], mask[:, start : start + width]
        gone = int((~chosen).sum())
        assert abs(gone - share * part.numel()) <= 1
        assert torch.equal(keep_highest(part.reshape(1, -1), gone).view(part.shape), chosen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"sparsity": 0.37, "scope": "row"}, {"sparsity": 0.52, "scope": "model"}, {"pattern": "2:4"},
        {"blocking": "columns", "block_columns": 16, "sparsity": 0.52}, {"blocking": "columns"}, {**PAPER},
    ],
)  # fmt: skip
def test_counts_are_exact_and_what_stays_is_the_original(
    options: dict[str, Any], dtype: torch.dtype, pico: Callable[..., Path], tmp_path: Path
) -> None:
    model = pico("llama", dtype)
    compress.prune(model, "dpruner", tmp_path / "out", **texts(tmp_path), **options)
    share = options.get("sparsity", 0.5)
    linears = manifest.read(tmp_path / "out")["linears"]
    gone = total = 0
    for name, facts in linears.items():
        W, original = weight(tmp_path / "out", name), CheckpointReader(model).read(f"{name}.weight")
        kept = W != 0
        assert torch.equal(W[kept].to(dtype), original[kept])
        zeros = int((~kept).sum())
        gone, total = gone + zeros, total + W.numel()
        if options.get("scope") == "row":
            assert set((~kept).sum(1).tolist()) == {int(share * W.shape[1] + 1e-6)}
        elif options.get("pattern"):
            assert set(kept.view(len(W), -1, 4).sum(2).view(-1).tolist()) == {2}
        elif options.get("scope") != "model":
            assert zeros == int(share * W.numel() + 1e-6)
        assert facts["density"] == pytest.approx(1 - zeros / W.numel(), abs=1e-5)
    if options.get("scope") == "model":
        assert gone == int(share * total + 1e-6)
    assert verify(tmp_path / "out") == []
    assert verify_deep(tmp_path / "out", model) == []


def test_a_share_of_the_whole_model_is_met(pico: Callable[..., Path], tmp_path: Path) -> None:
    report = compress.prune(pico("llama"), "dpruner", tmp_path / "out", sparsity=0.3, of_model=True, **texts(tmp_path))
    assert report.zeros_model == pytest.approx(0.3, abs=1e-3)
    assert report.zeros is not None
    assert report.zeros > 0.3


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "phi3", "gemma2"])
def test_families(family: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    report = compress.prune(pico(family), "dpruner", tmp_path / "out", **texts(tmp_path))
    assert report.zeros == pytest.approx(0.5, abs=1e-3)
    assert verify(tmp_path / "out") == []


# -- the run ---------------------------------------------------------------------------------------------------------------


def test_the_manifest_says_how_large_each_term_is(pico: Callable[..., Path], tmp_path: Path) -> None:
    compress.prune(pico("llama"), "dpruner", tmp_path / "out", **PAPER, **texts(tmp_path))
    rows = [t for block in manifest.read(tmp_path / "out")["search"] for t in block["terms"]]
    assert len(rows) == 14
    assert all(t["gW"] > 0 and t["gW2"] > 0 and t["W3"] > 0 for t in rows)
    assert all(0 < t["penalty"] < 1e-3 for t in rows)  # what docs/dpruner.md says of lambda's share


def test_general_text_is_not_read_where_nothing_asks_for_it(pico: Callable[..., Path], tmp_path: Path) -> None:
    seen: list[str] = []
    data = {**texts(tmp_path), "dataset": tmp_path / "missing.txt"}
    compress.prune(pico("llama"), "dpruner", tmp_path / "out", **PLAIN, **data, progress=lambda p: seen.append(p.what))
    assert "survey" not in seen
    known = manifest.read(tmp_path / "out")
    assert known["calibration_sha256"] is None
    assert known["domain_sha256"]


@pytest.mark.parametrize("options", [{"scope": "model"}, {"compensate": True}, {"recover": 1}])
@pytest.mark.parametrize("stop", [("survey", 0), ("survey", 1), ("gradients", 1), ("gradients", 0), ("blocks", 0)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    stop: tuple[str, int], options: dict[str, Any], pico: Callable[..., Path], tmp_path: Path
) -> None:
    model, data = pico("llama"), texts(tmp_path)
    compress.prune(model, "dpruner", tmp_path / "whole", **data, **options)
    walked: list[tuple[str, int]] = []

    def watch(p: Progress) -> None:
        walked.append(("blocks" if p.error is not None else p.what, p.block))
        if walked[-1] == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.prune(model, "dpruner", tmp_path / "out", **data, **options, progress=watch)
    assert not (tmp_path / "out").exists()
    before, walked[:] = list(walked), []
    note = lambda p: walked.append((p.what, p.block))  # noqa: E731
    report = compress.prune(model, "dpruner", tmp_path / "out", **data, **options, progress=note)
    assert report.resumed
    assert not {w for w in before if w[0] == "survey"} & {w for w in walked if w[0] == "survey"}  # nothing was made twice
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_the_domain_s_text_decides(pico: Callable[..., Path], tmp_path: Path) -> None:
    data = texts(tmp_path)
    compress.prune(pico("llama"), "dpruner", tmp_path / "a", **data)
    compress.prune(pico("llama"), "dpruner", tmp_path / "b", **{**data, "domain_dataset": data["dataset"]})
    assert manifest.read(tmp_path / "a")["domain_sha256"] != manifest.read(tmp_path / "b")["domain_sha256"]
    assert not torch.equal(weight(tmp_path / "a"), weight(tmp_path / "b"))


def test_gradients_of_the_domain_s_own_text_keep_the_domain(tmp_path: Path) -> None:
    """The claim in miniature: stories pruned for stories < for another text < by magnitude."""
    options: dict[str, Any] = {"nsamples": 8, "seqlen": 128, **PLAIN}
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        "stories": ("dpruner", {"domain_dataset": CALIBRATION, **options}),
        "other": ("dpruner", {"domain_dataset": BUILTIN, **options}),
        "magnitude": ("magnitude", {}),
    }  # fmt: skip
    found = {}
    for name, (method, given) in jobs.items():
        compress.prune(EXAMPLE, method, tmp_path / name, **given)
        found[name] = compress.evaluate(tmp_path / name, text=VALID, windows=24, batch_size=8)["perplexity"].value
    assert found["stories"] < 0.97 * found["other"] < 0.85 * found["magnitude"]  # 21.8, 23.0, 30.1


def test_compensation_keeps_the_mask_and_moves_what_stays_towards_the_output(pico: Callable[..., Path], tmp_path: Path) -> None:
    model, data = pico("llama"), texts(tmp_path)
    for name, flag in (("plain", False), ("moved", True)):
        compress.prune(model, "dpruner", tmp_path / name, compensate=flag, **data)
    name = "model.layers.0.self_attn.q_proj"  # the first block sees the same inputs in both
    plain, moved = weight(tmp_path / "plain", name), weight(tmp_path / "moved", name)
    assert torch.equal(plain != 0, moved != 0)
    assert not torch.equal(plain, moved)


def test_recovery_trains_what_stays_and_no_other_weight(pico: Callable[..., Path], tmp_path: Path) -> None:
    model, data = pico("llama"), texts(tmp_path)
    compress.prune(model, "dpruner", tmp_path / "plain", **data)
    compress.prune(model, "dpruner", tmp_path / "trained", recover=2, **data)
    plain, trained = weight(tmp_path / "plain"), weight(tmp_path / "trained")
    assert torch.equal(plain != 0, trained != 0)
    assert not torch.equal(plain, trained)


def test_given_a_mask_the_solver_beats_the_mask_alone() -> None:
    from compress.methods._sparse_solver import sparsify

    W, X = randn(24, 32), randn(64, 32, seed=1) @ (torch.eye(32) + 0.3)
    H = X.T @ X / 64
    mask = randn(24, 32, seed=2) > 0
    done = sparsify(W, _solvers.factorize(H.clone(), 0.01, "off", -1), mask=mask)

    def loss(V: torch.Tensor) -> float:
        return float((((V - W) @ H) * (V - W)).sum())

    assert loss(done.W) < 0.8 * loss(W * mask)
    assert not done.W[~mask].any()


# -- what can go wrong -----------------------------------------------------------------------------------------------------


def test_a_loss_without_gradient_is_answered_by_general_text_and_said(pico: Callable[..., Path], tmp_path: Path) -> None:
    """A head of zeros: every token is equally likely whatever the blocks say."""
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["lm_head.weight"])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    compress.prune(model, "dpruner", tmp_path / "out", general_weight=1.0, **texts(tmp_path))
    search = manifest.read(tmp_path / "out")["search"]
    assert [len(block["unseen"]) for block in search] == [7, 7]
    assert int((weight(tmp_path / "out") == 0).sum()) == 64 * 128 // 2


@pytest.mark.parametrize("content", ["", "   \n", "too short"])
def test_a_domain_text_without_a_window_is_an_error(content: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    data = texts(tmp_path)
    data["domain_dataset"].write_text(content)
    with pytest.raises(CompressError, match=r"domain\.txt: (no text found|\d+ tokens are less than one window)"):
        compress.prune(pico("llama"), "dpruner", tmp_path / "out", **data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("domain", [None, "gone.txt"])
def test_a_missing_domain_text_is_an_error(domain: str | None, pico: Callable[..., Path], tmp_path: Path) -> None:
    data = {**texts(tmp_path), "domain_dataset": domain and tmp_path / domain}
    if domain is None:
        data["dataset"] = tmp_path / "never read"
    with pytest.raises(CompressError, match=r"needs --domain-dataset|gone\.txt: no such file"):
        compress.prune(pico("llama"), "dpruner", tmp_path / "out", **data)


def test_other_methods_have_no_domain(pico: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="means nothing to wanda"):
        compress.prune(pico("llama"), "wanda", tmp_path / "out", **texts(tmp_path))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--scope", "global"], "--scope"), (["--blocking", "rows"], "--blocking"), (["--block-columns", "16"], "--blocking col"),
        (["--blocking", "columns", "--scope", "row"], "per matrix"), (["--blocking", "columns", "--pattern", "2:4"], "per matrix"),
        (["--lam", "-1"], "--lam"), (["--c1", "nan"], "--c1"), (["--samples", "0"], "--samples"), (["--batch", "0"], "--batch"),
        (["--mode", "still-standing"], "--mode"), (["--epochs", "0"], "--epochs"), (["--warmup", "1"], "--warmup"),
        (["--c1", "0", "--c2", "0", "--c3", "0", "--general-weight", "0"], "switched off"), (["--sparsity", "1.5"], "0..1"),
        (["--scope", "model", "--pattern", "2:4"], "pattern"), (["--pattern", "5:4"], "N:M"), (["--damp", "11"], "--damp"),
    ],
)  # fmt: skip
def test_wrong_options_are_usage_errors(options: list[str], why: str, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    domain = texts(tmp_path)["domain_dataset"]
    done = cli("prune", EXAMPLE, "-m", "dpruner", "--domain-dataset", domain, *options, "-o", tmp_path / "out")
    assert done.code == 2, done.err
    assert why in done.err
    assert not (tmp_path / "out").exists()

"""Linears that read the same input in one launch, through a loaded model's own modules, in Triton's interpreter: the products are
those of the members one by one, whoever calls them, and nothing else about the model changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_kernels import gpu_dense, gpu_table
from compress_kernels.gpu_table import Choice
from compress_kernels.int_grouped import triton

import compress
from compress import fusion
from compress.modules import CompressedLinear

pytest.importorskip("triton")
IDS = torch.arange(1, 6)[None]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", "triton")
    monkeypatch.setattr(gpu_table, "choose", lambda *_: Choice("fused"))  # one order of sums for every shape


@pytest.fixture(scope="module")
def artifact(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "out"
    compress.quantize(pico("llama"), "rtn", out, bits=4, group_size=32)
    return out


@pytest.fixture
def model(artifact: Path) -> Any:
    return compress.load(artifact, dtype="float32")


def groups(model: Any) -> list[fusion.Group]:
    found = {id(m.group): m.group for m in model.modules() if isinstance(m, CompressedLinear) and m.group is not None}
    return list(found.values())


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the weights that are multiplied from now on."""
    seen, run = [], triton.run

    def noted(x: Any, w: Any, *rest: Any) -> None:
        seen.append(w.shape)
        run(x, w, *rest)

    monkeypatch.setattr(triton, "run", noted)
    return seen


def alone(model: Any) -> None:
    """Serve the members one by one from now on."""
    for group in groups(model):
        group._whole = None


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out


def test_a_loaded_model_multiplies_a_group_in_one_launch_with_the_same_logits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [g.names for g in groups(model)] == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * 2
    seen = launches(monkeypatch)
    together = logits(model)
    assert seen == [(384, 64), (64, 64), (256, 64), (64, 128)] * 2  # each member from a multiple of 128 on
    seen.clear()
    with torch.inference_mode():
        tokens = model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert len(seen) == 4 * 2 * 2
    alone(model)
    seen.clear()
    assert torch.equal(logits(model), together)
    assert len(seen) == 7 * 2
    with torch.inference_mode():
        assert torch.equal(model.generate(IDS, max_new_tokens=2, do_sample=False), tokens)


def test_members_are_views_of_one_weight_and_run_alone(model: Any) -> None:
    group = groups(model)[0]
    for member in group.members:
        for name in ("words", "stats"):
            part, whole = getattr(member.prepared.gpu, name), getattr(group._whole, name)
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        x = torch.randn(3, 64)
        want = torch.nn.functional.linear(x, member.dense_weight(), member.bias)
        torch.testing.assert_close(member(x), want, rtol=1e-5, atol=1e-5)


def given(group: fusion.Group) -> tuple[Any, Callable[[int, torch.Tensor], torch.Tensor]]:
    """The members as a call of their parent sees them, and what each is alone."""
    stand_in = fusion._Parent(group)
    return [getattr(stand_in, name) for name in group.names], lambda i, x: group.members[i](x)


@pytest.mark.parametrize("inference", [False, True])
def test_no_order_of_calls_gives_another_inputs_product(model: Any, inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, want = given(groups(model)[0])
    seen = launches(monkeypatch)
    with torch.inference_mode(inference):
        x, other = torch.randn(2, 64), torch.randn(2, 64)
        for i, t in [(2, x), (0, x), (0, x), (1, other), (1, x), (2, x.clone()), (0, other), (2, x)]:
            assert torch.equal(parts[i](t), want(i, t))
        y = parts[0](x)
        y.zero_()  # a caller may write to what it was given
        assert torch.equal(parts[1](x), want(1, x))
        assert torch.equal(parts[0](x), want(0, x))
    assert (384, 64) in seen


def test_an_input_that_was_written_to_is_multiplied_again(model: Any) -> None:
    parts, want = given(groups(model)[0])
    x = torch.randn(2, 64)
    parts[0](x)
    x.mul_(2)
    assert torch.equal(parts[1](x), want(1, x))


def test_inputs_that_need_gradients_are_served_one_by_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, _ = given(groups(model)[0])
    seen = launches(monkeypatch)
    parts[0](torch.randn(2, 64, requires_grad=True))
    assert seen == [(64, 64)]
    assert not groups(model)[0].takes(torch.randn(2, 64).double())  # the Triton path has no float64


@pytest.mark.parametrize("how", ["hook", "forward", "replaced", "prepared"])
def test_members_that_were_changed_are_served_one_by_one(how: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, before = model.model.layers[0].self_attn, logits(model)
    q = attention.q_proj
    if how == "hook":
        q.register_forward_hook(lambda module, args, y: 0 * y)
    elif how == "forward":
        plain = q.forward
        q.forward = lambda x: 0 * plain(x)
    elif how == "replaced":
        attention.q_proj = torch.nn.Linear(64, 64)
    else:
        monkeypatch.setenv("COMPRESS_BACKEND", "tiled")
        q.prepare(exact=True)
        assert q.path == "tiled"
    seen = launches(monkeypatch)
    after = logits(model)
    assert (384, 64) not in seen[:3]
    assert (256, 64) in seen  # the other group still is one
    assert torch.allclose(before, after, atol=1e-5) == (how == "prepared")


def test_a_forward_that_is_not_transformers_own_gets_the_members_themselves(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, mlp = logits(model), type(model.model.layers[0].mlp)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(x))
        up: torch.Tensor = self.up_proj(x.mul_(2))  # writes to its input
        y: torch.Tensor = self.down_proj(gate * up)
        return y

    monkeypatch.setattr(mlp, "forward", forward)
    with torch.inference_mode():
        after = model(IDS).logits
    alone(model)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, after)
    assert not torch.allclose(before, after, atol=1e-3)


def test_moves_copies_and_saved_tensors_are_those_of_the_members(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state, want = {name: t.clone() for name, t in model.state_dict().items()}, logits(model)
    alike = [copy.deepcopy(model), pickle.loads(pickle.dumps(model.model.layers[0].mlp))]
    assert torch.equal(logits(alike[0]), want)
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(alike[1](x), model.model.layers[0].mlp(x))
    assert alike[1].gate_proj.group.parent is alike[1]
    assert groups(alike[0])[0].parent is alike[0].model.layers[0].self_attn
    model.to(torch.float16)
    assert all(g._whole is not None for g in groups(model))
    model.to(torch.float32)  # weights keep their stored types; biases were rounded
    model.load_state_dict(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    seen = launches(monkeypatch)
    moved = logits(model)
    assert len(seen) == 4 * 2
    torch.testing.assert_close(moved, want, rtol=1e-2, atol=1e-2)  # rotary frequencies were rounded too
    alone(model)
    assert torch.equal(logits(model), moved)
    monkeypatch.setenv("COMPRESS_BACKEND", "tiled")
    model.to(torch.float64)
    model.to(torch.float32)  # prepared again, for another path
    assert not any("forward" in vars(g.parent) for g in groups(model))
    torch.testing.assert_close(logits(model), moved, rtol=1e-4, atol=1e-4)


def test_a_change_of_a_bias_is_seen(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias.data += 1
        model.model.layers[1].self_attn.v_proj.bias = torch.nn.Parameter(torch.ones(32))
    together = logits(model)
    alone(model)
    assert torch.equal(logits(model), together)


def test_the_modules_compile_without_a_break_and_fused(model: Any) -> None:
    block, x = model.model.layers[0], torch.randn(1, 3, 64)
    turned = model.model.rotary_emb(x, torch.arange(3)[None])
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        want = block(x, position_embeddings=turned)
        assert torch.equal(torch.compile(block, backend=backend, fullgraph=True)(x, position_embeddings=turned), want)
    products = [n for n in graphs[0].graph.nodes if "int_grouped_triton" in str(n.target)]
    assert len(products) == 4  # q, k and v; o; gate and up; down


def test_members_that_differ_stay_apart(pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress.quantize(pico("llama"), "rtn", tmp_path / "out", bits=4, group_size=32, layer_config=("re:.*k_proj=3",))
    model = compress.load(tmp_path / "out", dtype="float32")
    first, second = groups(model)[:2]
    assert first.reason == "their bits differ"
    assert "forward" not in vars(first.parent)
    assert second._whole is not None
    seen = launches(monkeypatch)
    logits(model)
    assert len(seen) == 6 * 2


def test_other_paths_are_left_alone(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_BACKEND", "tiled")
    model = compress.load(artifact, dtype="float32")
    assert {g.reason for g in groups(model)} == {"its members are not all on the Triton path"}
    assert not any("forward" in vars(m) for name, m in model.named_modules() if name)


def test_dense_copies_lie_in_memory_once_too(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_GPU_DENSE", "all")
    model = compress.load(artifact, dtype="float32")
    want = logits(model)
    monkeypatch.setattr(gpu_table, "choose", lambda *args: Choice("dense" if args[5] else "fused"))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    group = groups(model)[0]
    whole = group._whole.dense
    assert all(m.prepared.gpu.dense.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for m in group.members)
    each = [128 * n * 4 for n in (3 * 64, 64, 2 * 64, 128)]  # padded to 128 rows, fp32
    assert gpu_dense.used(torch.device("cpu")) == 2 * sum(each)
    del model, group, whole
    import gc

    gc.collect()
    assert gpu_dense.used(torch.device("cpu")) == 0

"""Native decoding: the kernel against its definition, and models against their own forward."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_kernels import block, native
from compress_kernels.block import reference
from conftest import EXAMPLE
from test_native import BF16, F16, F32, generator, integers, isa, randn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import compress
from compress import decoding, subjects, timing
from compress.decoding import loop
from compress.modules import CompressedLinear, linear_shape, place

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")
__all__ = ["isa"]

# -- the kernel -----------------------------------------------------------------------------------------------------------


def masked_weight(O: int, I: int, codes: bool, seed: int) -> Any:
    kept = (torch.rand(O, I // 4, 4, generator=generator(seed)).argsort(-1) < 2).view(O, I).to(torch.uint8)
    if not codes:
        return native.masked.prepare(kept, randn(O * I // 2, dtype=BF16, seed=seed) * 0.2)
    q = torch.randint(0, 16, (O, I // 2), dtype=torch.uint8, generator=generator(seed))
    return native.masked.prepare_codes(kept, q, torch.rand(O, I // 32, generator=generator(seed)) * 0.05, None)


def linear(kind: str, O: int, I: int, dtype: torch.dtype, seed: int) -> block.Linear:
    bias = randn(O, dtype=dtype, seed=seed) if seed % 2 else None
    if kind == "dense":
        weight: Any = randn(O, I, dtype=dtype, seed=seed) * I**-0.5
    elif kind in ("masked", "codes"):
        weight = masked_weight(O, I, kind == "codes", seed)
    else:
        bits, exact = (3, True) if kind == "exact" else (4, False)
        weight, _ = integers(O, I, 32, bits, seed % 3 == 0, F16, exact, outliers=kind == "outliers")
        weight = scaled(weight)
    return block.Linear(weight, bias, dtype)


def scaled(weight: Any) -> Any:
    """The same codes with scales that keep a random model's numbers near 1."""
    from compress_kernels.int_grouped import cpu

    own = weight.outliers
    csr = own and (*own[:2], own[2] * 0.01, *own[3:5], own[5] * 0.01)
    return cpu.make(weight.codes, weight.scale * 0.02, weight.zero, csr, weight.shape, weight.bits, weight.exact)


KINDS = ("int8", "exact", "outliers", "masked", "codes", "dense")


class Random:
    """A random model of two blocks whose linears are of all kinds in turn, and a cache that holds a text."""

    def __init__(self, dtype: torch.dtype, B: int, *, D: int = 64, heads: int = 6, kv: int = 2, d: int = 16, inner: int = 96,
                 qk: bool = False, turn: int = 0, outputs: int = 37, capacity: int = 40, every: Sequence[str] = KINDS,
                 linear: Callable[..., block.Linear] = linear) -> None:  # fmt: skip
        kinds = [every[(turn + i) % len(every)] for i in range(15)]
        sizes = {"q": (heads * d, D), "k": (kv * d, D), "v": (kv * d, D), "o": (D, heads * d), "gate": (inner, D), "up": (inner, D),
                 "down": (D, inner)}  # fmt: skip
        self.blocks = []
        for b in range(2):
            parts = {n: linear(kinds[7 * b + i], *size, dtype, 7 * b + i) for i, (n, size) in enumerate(sizes.items())}
            norms = {n: 1 + 0.1 * randn(D, seed=b) for n in ("norm_in", "norm_mid")}
            norms |= {n: 1 + 0.1 * randn(d, seed=b + 1) for n in ("norm_q", "norm_k")} if qk else {}
            self.blocks.append(block.Block(**parts, **{n: t.to(dtype) for n, t in norms.items()}))
        self.norm = (1 + 0.1 * randn(D)).to(dtype)
        self.head = linear(kinds[14], outputs, D, dtype, 14)
        self.shape = block.Shape(heads, kv, d, 1e-5, d**-0.5)
        self.cache = [randn(2, B, kv, capacity, d, dtype=dtype, seed=9 + b) for b in range(2)]
        self.x = randn(B, D, dtype=dtype, seed=20)
        angle = torch.rand(B, d // 2, generator=generator(3)) * 6
        self.cos, self.sin = angle.cos(), angle.sin()
        self.dtype, self.capacity = dtype, capacity

    def decoder(self) -> block.Decoder:
        assert block.can_run(self.blocks, self.norm, self.head, self.shape, self.dtype) is None
        return block.Decoder(self.blocks, self.norm, self.head, self.shape, self.dtype)

    def native(self, slot: int, first: list[int]) -> torch.Tensor:
        rows = block.pointers(self.cache), self.capacity, slot, torch.tensor(first)
        return self.decoder().step(self.x, *rows, self.cos.data_ptr(), self.sin.data_ptr())

    def definition(self, slot: int, first: list[int]) -> torch.Tensor:
        cache = [c.clone() for c in self.cache]
        return reference.step(
            self.x, self.blocks, self.norm, self.head, self.shape, cache, slot, torch.tensor(first), self.cos, self.sin
        )


@pytest.mark.parametrize("turn", range(len(KINDS)))
def test_a_step_agrees_with_its_definition(turn: int, isa: str) -> None:
    dtype = (F32, BF16, F16)[turn % 3]
    for B, slot, first in ((1, 0, [0]), (1, 39, [7]), (3, 17, [0, 5, 17])):
        case = Random(dtype, B, qk=turn % 2 == 1, turn=turn, kv=(2, 3, 6)[turn % 3])
        want = case.definition(slot, first)
        y = case.native(slot, first)
        assert y.dtype == F32
        # x of a masked kernel is rounded to bf16, and a sum of other order may round otherwise
        assert (y - want).norm() < (1e-4 if dtype == F32 else 2e-2) * want.norm(), (B, slot)


@pytest.mark.parametrize("d", [32, 48, 80, 128])
def test_heads_of_other_sizes_and_many_heads_per_key(d: int) -> None:
    case = Random(F32, 2, kv=1, d=d, turn=5)
    want = case.definition(33, [0, 3])
    assert (case.native(33, [0, 3]) - want).norm() < 1e-4 * want.norm()


def test_keys_and_values_are_written_and_nothing_else_is() -> None:
    case = Random(BF16, 2, turn=5)
    before = [c.clone() for c in case.cache]
    case.definition(11, [0, 0])
    want = [c.clone() for c in before]
    first = torch.zeros(2, dtype=torch.int64)
    reference.step(case.x, case.blocks, case.norm, case.head, case.shape, want, 11, first, case.cos, case.sin)
    case.native(11, [0, 0])
    for old, seen, wanted in zip(before, case.cache, want, strict=True):
        assert torch.allclose(seen[:, :, :, 11].float(), wanted[:, :, :, 11].float(), rtol=2e-2, atol=1e-2)
        others = torch.arange(case.capacity) != 11
        assert torch.equal(seen[:, :, :, others], old[:, :, :, others])


def test_threads_change_no_bit() -> None:
    case = Random(BF16, 3, D=256, inner=1312, turn=1)  # large enough to run on more than one
    one = case.native(17, [0, 5, 17])
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(one, case.native(17, [0, 5, 17]))
    finally:
        torch.set_num_threads(threads)


def test_nan_reaches_its_row_alone() -> None:
    case = Random(F32, 3)
    case.x[1, 3] = float("nan")
    y = case.native(17, [0, 0, 0])
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    case = Random(F32, 2)
    for slot, first in ((40, [0, 0]), (-1, [0, 0]), (3, [0, 4]), (3, [-1, 0])):
        with pytest.raises(RuntimeError, match="shape"):
            case.native(slot, first)
    wrong = copy.copy(case)
    wrong.head = linear("dense", 37, 96, F32, 14)
    with pytest.raises(RuntimeError, match="shape"):
        wrong.decoder()
    odd = block.Shape(6, 2, 24, 1e-5, 1.0)
    assert "heads of 24" in str(block.can_run(case.blocks, case.norm, case.head, odd, F32))


# -- models ---------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SMOLLM = {**SMALL, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "smollm": lambda: LlamaConfig(**SMOLLM),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
    "llama3": lambda: LlamaConfig(**SMALL, **rope("llama3", **LLAMA3)),
    "linear": lambda: LlamaConfig(**SMALL, **rope("linear", factor=2.0)),
    "yarn": lambda: Qwen2Config(**SMALL, **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
}


def model_of(config: Any, dtype: torch.dtype = F32, kinds: tuple[str, ...] = ("int4",), head: str = "") -> Any:
    """A random model with compressed linears, ready to decode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for i, (name, module) in enumerate(list(model.named_modules())):
        shape, kind = linear_shape(module), head if name == "lm_head" else kinds[i % len(kinds)]
        if shape is None or not kind:
            continue
        packed = subjects.KINDS[kind](*shape, generator(i))
        options: dict[str, Any] = {"stored": "BF16", "dtype": dtype, "bias": module.bias is not None, "device": "cpu"}
        made = CompressedLinear(packed.kind, packed.params, shape, **options)
        for suffix, tensor in packed.tensors.items():
            made._buffers[suffix] = tensor
        if made.bias is not None:
            made.bias.data = randn(shape[0], dtype=dtype, seed=i) * 0.1
        made.prepare()
        place(model, name, made)
    return decoding.attach(model)


def steps(model: Any, ids: torch.Tensor, count: int, on: bool) -> torch.Tensor:
    """Logits of every step (count, B, V) behind a prompt, with the tokens that ids' own continuation has."""
    model.decoding.enabled = on
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(input_ids=ids[:, :-count], cache=cache)
        for i in range(ids.shape[1] - count, ids.shape[1]):
            found.append(model(input_ids=ids[:, i : i + 1], cache=cache).logits[:, 0].float())
    model.decoding.enabled = True
    return torch.stack(found)


def ids_of(B: int, T: int, vocab: int = 96) -> torch.Tensor:
    return torch.randint(3, vocab, (B, T), generator=generator(5))


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_models_own_forward_at_every_step(family: str) -> None:
    model = model_of(CONFIGS[family]())
    assert model.decoding.path == "native"
    ids = ids_of(2, 20)
    slow, fast = steps(model, ids, 12, False), steps(model, ids, 12, True)
    assert (slow - fast).abs().max() < 1e-4 * slow.abs().max()
    assert not torch.equal(slow, fast), "the native path did not run"


@pytest.mark.parametrize("head", ["", "int8"])
def test_sixteen_bits_are_as_near_to_fp32_as_transformers_is(head: str) -> None:
    for kinds in (("int4",), ("bitmask", "sparse24", "sparse24_int4"), ("int3", "int4+1%")):
        model = model_of(CONFIGS["qwen3"](), BF16, kinds, head)
        assert model.decoding.path == "native"
        ids = ids_of(2, 20)
        slow, fast = steps(model, ids, 8, False), steps(model, ids, 8, True)
        assert (slow - fast).norm() < 0.05 * slow.norm(), kinds


def greedy(model: Any, ids: torch.Tensor, on: bool, **more: Any) -> torch.Tensor:
    model.decoding.enabled = on
    out: torch.Tensor = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=12, min_new_tokens=12, **more)
    model.decoding.enabled = True
    return out


def test_generate_gives_the_same_tokens() -> None:
    model = model_of(CONFIGS["llama"]())
    ids = ids_of(3, 9)
    ids[0, :4] = ids[2, :1] = 0  # padded on the left
    calls = counted(model)
    drawn: dict[str, Any] = {"do_sample": True, "top_k": 20}
    for more in ({}, {"num_beams": 3}, {"repetition_penalty": 1.5}, drawn, {**drawn, "num_return_sequences": 2}):
        options, before = {"do_sample": False, **more}, calls[0]
        torch.manual_seed(1)
        fast = greedy(model, ids, True, **options)
        assert calls[0] >= before + 11, more
        torch.manual_seed(1)
        assert torch.equal(fast, greedy(model, ids, False, **options)), more


def counted(model: Any) -> list[int]:
    """Count the native steps of a model."""
    calls, method = [0], model.decoding.step

    @functools.wraps(method)
    def step(*args: Any) -> Any:
        calls[0] += 1
        return method(*args)

    model.decoding.step = step
    return calls


def test_a_cache_goes_on_where_another_path_left_it() -> None:
    model = model_of(CONFIGS["qwen3"]())
    ids = ids_of(2, 30)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        model.decoding.enabled = False
        model(input_ids=ids[:, :10], cache=cache)  # an ordinary cache
        model.decoding.enabled = True
        seen = [model(input_ids=ids[:, 10:11], cache=cache).logits]
        seen += [model(input_ids=ids[:, 11:20], cache=cache).logits]  # several tokens: the model's own path
        seen += [model(input_ids=ids[:, 20:21], cache=cache).logits]
        twin = copy.deepcopy(cache)
        seen_twin = model(input_ids=ids[:, 21:22], cache=twin).logits
        assert cache.get_seq_length() == 21
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = [model(input_ids=ids.flip(0)[:, i : i + 1], cache=cache).logits for i in range(16, 30)]
    assert (seen_twin - want[:, 21:22]).abs().max() < 1e-4 * want.abs().max()
    assert (torch.cat(seen, 1) - want[:, 10:21]).abs().max() < 1e-4 * want.abs().max()
    assert (torch.cat(swapped, 1).flip(0) - want[:, 16:]).abs().max() < 1e-4 * want.abs().max()


def test_calls_that_ask_for_more_take_the_models_own_path() -> None:
    model = model_of(CONFIGS["llama"]())
    ids, calls = ids_of(1, 8), counted(model)
    out = greedy(model, ids, True, do_sample=False, output_hidden_states=True, output_attentions=True, return_dict_in_generate=True)
    assert len(out.hidden_states) == 12  # type: ignore[attr-defined]
    greedy(model, ids, True, do_sample=False, cache_implementation="static")
    seen: list[int] = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    greedy(model, ids, True, do_sample=False)
    handle.remove()
    assert len(seen) == 12
    many = ids_of(block.ROWS + 1, 8)
    greedy(model, many, True, do_sample=False)
    assert calls[0] == 0
    greedy(model, ids, True, do_sample=False)
    assert calls[0] == 11


def test_texts_that_are_written_at_the_same_time_do_not_mix() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = model_of(CONFIGS["llama"]())
    prompts = [ids_of(1, n) for n in (5, 9, 14)]
    alone = [greedy(model, ids, True, do_sample=False) for ids in prompts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda ids: greedy(model, ids, True, do_sample=False), prompts * 3))
    assert all(map(torch.equal, together, alone * 3))


def test_a_hole_in_the_mask_takes_the_models_own_path() -> None:
    model = model_of(CONFIGS["llama"]())
    ids, calls = ids_of(1, 8), counted(model)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    fast = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert calls[0] == 0
    model.decoding.enabled = False
    assert torch.equal(fast, model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False))


def test_modules_that_are_moved_replaced_or_prepared_again_are_followed() -> None:
    model = model_of(CONFIGS["smollm"]())
    ids = ids_of(1, 20, 90)

    def check(what: str) -> None:
        assert model.decoding.path == "native", what
        slow, fast = steps(model, ids, 6, False), steps(model, ids, 6, True)
        assert (slow - fast).abs().max() < (0.05 if model.dtype == BF16 else 1e-4) * slow.abs().max(), what

    check("as made")
    q = model.model.layers[0].self_attn.q_proj
    packed = subjects.KINDS["int4"](*q.shape, generator(77))
    for suffix, tensor in packed.tensors.items():
        q._buffers[suffix] = tensor
    q.prepare()
    check("prepared again")
    place(model, "model.layers.1.mlp.up_proj", torch.nn.Linear(192, 128, bias=False).requires_grad_(False))
    check("a dense linear in the place of a compressed one")
    model.model.norm.weight = torch.nn.Parameter(torch.rand(192), requires_grad=False)
    check("another norm")
    model.to(BF16)
    check("bf16")
    model.to(F32)
    other = model.model.layers[0].mlp.gate_proj
    x = randn(2, 192)
    assert torch.equal(other(x), copy_of(other)(x)), "a linear called alone"
    check("fp32 again")


def copy_of(module: CompressedLinear) -> CompressedLinear:
    made = CompressedLinear(module.kind, module.params, module.shape, stored="BF16", dtype=module.dtype, device="cpu")
    for suffix, tensor in module.named_buffers():
        made._buffers[suffix] = tensor
    made.prepare()
    return made


SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dynamic rope": (lambda: LlamaConfig(**SMALL, **rope("dynamic", factor=2.0)), "dynamic"),
    "window": (lambda: MistralConfig(**SMALL, sliding_window=8), "window of 8"),
    "layers": (lambda: Qwen2Config(**SMALL, **SLIDING), "sliding_attention"),
    "gelu": (lambda: LlamaConfig(**SMALL, hidden_act="gelu"), "gelu"),
    "head": (lambda: LlamaConfig(**{**SMALL, "num_attention_heads": 8}), "heads of 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_has_not_falls_back_and_says_why_once(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, why = REFUSED[case]
    model = model_of(make())
    decoding._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "compress.decoding"):
        out = greedy(model, ids_of(1, 8), True, do_sample=False)
    assert len([r for r in caplog.records if why in r.message]) == 1
    assert why in model.decoding.path
    assert torch.equal(out, greedy(model, ids_of(1, 8), False, do_sample=False))


def test_other_families_and_paths_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Gemma2Config

    model = model_of(Gemma2Config(**SMALL, head_dim=16))
    assert "Gemma2ForCausalLM is none of" in model.decoding.path
    monkeypatch.setenv("COMPRESS_BACKEND", "tiled")
    assert "its path is tiled" in model_of(CONFIGS["llama"]()).decoding.path


# -- the loop, and an artifact --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decode") / "w4"
    compress.quantize(EXAMPLE, "rtn", out, bits=4, group_size=32)
    return out


def test_a_real_model_decodes_as_its_own_forward_does(story: Path) -> None:
    model = compress.load(story, dtype="float32")
    text = "Once upon a time there was a little dog. He liked to run and play in the park with his friends."
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(EXAMPLE)(text, return_tensors="pt").input_ids
    slow, fast = steps(model, ids, 20, False), steps(model, ids, 20, True)
    assert (slow - fast).abs().max() < 2e-4 * slow.abs().max()
    half = compress.load(story, dtype="bfloat16")
    assert half.decoding.path == "native"
    ours, theirs = steps(half, ids, 20, True), steps(half, ids, 20, False)
    assert (ours - slow).norm() <= 1.2 * (theirs - slow).norm(), "further from fp32 than transformers' path"


def test_the_loops_tokens_are_generates(story: Path) -> None:
    model = compress.load(story)
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    assert loop.usable(model) is None
    plain = model.generate(ids, max_new_tokens=40, do_sample=False)[0, 5:].tolist()
    assert list(loop.tokens(model, ids, 40)) == plain
    torch.manual_seed(3)
    drawn = model.generate(ids, max_new_tokens=40, do_sample=True, temperature=0.8)[0, 5:].tolist()
    assert list(loop.tokens(model, ids, 40, temperature=0.8, seed=3)) == drawn
    model.generation_config.eos_token_id = plain[7]
    assert list(loop.tokens(model, ids, 40)) == model.generate(ids, max_new_tokens=40, do_sample=False)[0, 5:].tolist()
    model.generation_config.repetition_penalty = 1.2
    assert "repetition_penalty" in str(loop.usable(model))


def test_the_command_writes_the_same_text_by_both_loops(
    story: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("generate", story, "--prompt", "Once upon a time", "--max-new-tokens", 30)
    ours = cli(*args)
    assert ours.code == 0, ours.err
    monkeypatch.setattr(loop, "usable", lambda model: "no")
    assert cli(*args).out == ours.out


def test_bench_says_which_path_runs_and_where_the_time_goes(story: Path) -> None:
    (speed,) = timing.model(story, prompt=8, tokens=4, repeats=1)
    assert speed.path == "native"
    rows = list(timing.profile(story, prompt=8, tokens=8))
    assert [row.path for row in rows] == ["native", "native, own loop", "transformers"]
    for found in rows:  # of separate runs, so that a busy machine may make either larger
        assert found.kernels > 0
        assert found.token > 0
    (dense,) = timing.profile(EXAMPLE, prompt=8, tokens=8)
    assert dense.path == "transformers"


def test_a_copied_model_decodes_with_its_own_weights() -> None:
    model = model_of(CONFIGS["llama"](), kinds=("",))
    ids = ids_of(1, 12)
    before = steps(model, ids, 4, True)
    twin = copy.deepcopy(model)
    assert twin.decoding is not model.decoding
    twin.model.norm.weight.data.zero_()
    assert torch.equal(steps(model, ids, 4, True), before)
    assert not steps(twin, ids, 4, True).any()


def test_what_autograd_asks_for_takes_the_models_own_path() -> None:
    model = model_of(CONFIGS["llama"](), kinds=("",))  # kernels of compressed weights have no gradients
    ids, calls = ids_of(1, 8), counted(model)
    greedy(model, ids, True, do_sample=False)
    before = calls[0]
    model.model.norm.weight.requires_grad_()  # after the decoder was made
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, cache=cache)
    assert model(input_ids=ids[:, :1], cache=cache).logits.requires_grad
    assert calls[0] == before
    model.model.norm.weight.requires_grad_(False)
    prefix = [randn(1, 2, 4, 16, seed=i).requires_grad_() for i in range(4)]  # keys and values that are learnt
    gradients = []
    for on in (False, True):
        model.decoding.enabled, cache = on, DynamicCache(config=model.config)
        for i in range(2):
            cache.update(prefix[2 * i], prefix[2 * i + 1], i)
        sums = [model(input_ids=part, cache=cache).logits.square().sum() for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
        gradients.append(torch.autograd.grad(sums[0] + sums[1] + sums[2], prefix))
    for own, ours in zip(*gradients, strict=True):
        assert own.abs().max() > 0
        assert torch.allclose(own, ours, rtol=1e-4, atol=1e-5)


def test_attention_of_somebody_elses_and_hooks_on_all_modules_are_not_passed_over() -> None:
    from torch.nn.modules.module import register_module_forward_hook
    from transformers import AttentionInterface

    def nothing(module: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(q).transpose(1, 2).contiguous(), None

    model = model_of(CONFIGS["llama"]())
    ids, calls = ids_of(1, 8), counted(model)
    greedy(model, ids, True, do_sample=False)
    before = calls[0]
    AttentionInterface.register("nothing", nothing)
    model.set_attn_implementation("nothing")
    assert torch.equal(steps(model, ids, 3, True), steps(model, ids, 3, False))
    assert calls[0] == before
    model.set_attn_implementation("sdpa")
    seen: list[Any] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    steps(model, ids, 3, True)
    handle.remove()
    assert seen.count(model.model.norm) == 4
    assert calls[0] == before
    steps(model, ids, 3, True)
    assert calls[0] == before + 3


def test_a_cache_of_another_batch_or_dtype_is_never_written_beside() -> None:
    model = model_of(CONFIGS["llama"](), BF16)
    ids, calls = ids_of(1, 8), counted(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            model(input_ids=part, cache=cache)
        assert calls[0] == 1
        with pytest.raises((ValueError, RuntimeError)):
            model(input_ids=ids_of(2, 1), cache=cache)
        found = []
        for on in (False, True):
            model.to(BF16)
            model.decoding.enabled, cache = on, DynamicCache(config=model.config)
            for part in (ids, ids[:, :1]):
                model(input_ids=part, cache=cache)
            model.to(F32)  # the cache stays as it is
            found.append(model(input_ids=ids[:, 1:2], cache=cache).logits)
            found.append(model(input_ids=ids[:, 2:3], cache=cache).logits)
            assert cache.layers[0].keys.dtype == F32
        assert (found[0] - found[2]).norm() < 0.05 * found[0].norm()
        assert (found[1] - found[3]).norm() < 0.05 * found[1].norm()
        other = DynamicCache()
        for i in range(2):
            other.update(randn(1, 4, 3, 16), randn(1, 4, 3, 16), i)  # of a model with more heads
        with pytest.raises((ValueError, RuntimeError)):
            model(input_ids=ids[:, :1], cache=other)
        with pytest.raises((ValueError, RuntimeError)):
            model_of(CONFIGS["smollm"]())(input_ids=ids[:, :1], cache=cache)


def test_a_cache_lives_no_longer_than_its_user_and_takes_other_tensors() -> None:
    import gc
    import io
    import weakref

    model = model_of(CONFIGS["llama"]())
    ids = ids_of(1, 8)
    with torch.no_grad():
        found = []
        for on in (False, True):
            model.decoding.enabled, cache = on, DynamicCache(config=model.config)
            for part in (ids[:, :6], ids[:, 6:7]):
                model(input_ids=part, cache=cache)
            for layer in cache.layers:  # what evicts keys does this
                layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
            assert cache.get_seq_length() == 5
            for _ in range(2):
                found.append(model(input_ids=ids[:, 7:], cache=cache, position_ids=torch.tensor([[7]])).logits)
        assert torch.allclose(found[0], found[2], atol=1e-4)
        assert torch.allclose(found[1], found[3], atol=1e-4)
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        assert torch.equal(read.layers[1].values, cache.layers[1].values)
        again = [model(input_ids=ids[:, :1], cache=c).logits for c in (read, copy.deepcopy(cache), cache)]
        assert torch.equal(again[0], again[2])
        assert torch.equal(again[1], again[2])
        buffer = weakref.ref(cache.layers[0].buffer)
        del cache, layer
        gc.collect()
        assert buffer() is None

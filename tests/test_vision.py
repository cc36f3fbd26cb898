"""Vision-language checkpoints: the text decoder is compressed, the vision tower and the projector are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WITHOUT_US, _save_tokenizer, outliers, python
from safetensors.torch import load_file, save_file
from test_families import TEXT, run_blocks

import compress
from compress.audit import unpack, verify, verify_deep
from compress.checkpoint import manifest
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.models import rotate
from compress.models.head import Head
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView
from compress.modules import CompressedLinear

IMAGE = 120  # the image token
_TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 127, "max_position_embeddings": 64,
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
           "patch_size": 8}  # fmt: skip
_CLIP, _SIGLIP = {**_VISION, "model_type": "clip_vision_model"}, {**_VISION, "model_type": "siglip_vision_model"}
_MROPE = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_QWEN = {"text_config": _MROPE, "image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122,
         "vision_end_token_id": 123}  # fmt: skip
_LLAVA = {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _CLIP, "image_token_index": IMAGE}
_QWEN2 = {"text_config": {"model_type": "qwen2", **_TEXT}, "image_token_id": IMAGE}
_SMALL = {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": {**_VISION, "patch_size": 4}, "scale_factor": 2,
          "image_token_id": IMAGE}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **_QWEN,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        **_QWEN,
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2,
                          "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
    },
    "llava": {**_LLAVA, "image_seq_length": 4},
    "llava_next": {**_LLAVA, "image_grid_pinpoints": [[16, 16]]},
    "llava_onevision": {**_QWEN2, "vision_config": _SIGLIP, "image_grid_pinpoints": [[16, 16]]},
    "vipllava": {**_LLAVA, "vision_feature_layers": [-1, -2]},
    "internvl": {**_QWEN2, "vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [8, 8]}, "image_seq_length": 1},
    "mistral3": {**_LLAVA, "text_config": {"model_type": "mistral", **_TEXT},
                 "vision_config": {**_VISION, "model_type": "pixtral", "patch_size": 4}},
    "paligemma": {**_LLAVA, "text_config": {"model_type": "gemma", **_TEXT, "head_dim": 16}, "vision_config": _SIGLIP,
                  "projection_dim": 64},
    "idefics3": _SMALL,
    "smolvlm": _SMALL,
}  # fmt: skip
NAMED = ["qwen2_vl", "qwen2_5_vl", "llava"]
METHODS = ["rtn", "awq", "gptq", "rsq"]


def inputs(family: str) -> dict[str, torch.Tensor]:
    """An image and text around it."""
    generator = torch.Generator().manual_seed(3)
    tiled = family in ("llava_next", "llava_onevision")
    count = 10 if tiled else 1 if family == "internvl" else 4
    ids = torch.randint(3, 119, (1, 20 + count), generator=generator)
    ids[0, 5 : 5 + count] = IMAGE
    if family.startswith("qwen"):
        pixels, grid = torch.randn(16, 3 * 2 * 4 * 4, generator=generator), torch.tensor([[1, 4, 4]])
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
    more = {"image_sizes": torch.tensor([[16, 16]])} if tiled or family == "mistral3" else {}
    pixels = torch.randn(2 if tiled else 1, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels[None] if tiled or family in ("idefics3", "smolvlm") else pixels, **more}


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    out: torch.Tensor = model(**inputs(family)).logits
    return out


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A saved random vision-language model: `save_pretrained` writes the names that hub checkpoints have."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    made: dict[tuple[str, bool], Path] = {}

    def make(family: str, tied: bool = False) -> Path:
        if (family, tied) not in made:
            torch.manual_seed(0)
            tie = {"tie_word_embeddings": tied}  # older checkpoints say it in the text config, newer ones beside it
            fields = {**CONFIGS[family], **tie, "text_config": {**CONFIGS[family]["text_config"], **tie}}
            model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **fields))
            outliers(model)
            made[family, tied] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family, tied])
            _save_tokenizer(made[family, tied])
        return made[family, tied]

    return make


def quantize(source: Path, method: str, out: Path, **options: Any) -> Path:
    text = out.with_name(f"{out.name}.txt")
    text.write_text(TEXT)
    data = {"dataset": text, "nsamples": 4, "seqlen": 32} if method != "rtn" else {}
    compress.quantize(source, method, out, **{"bits": 4, "group_size": 32, **data, **options})
    return out


@pytest.fixture(scope="session")
def artifact(vision: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The artifact of a family and a method."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, method: str) -> Path:
        if (family, method) not in made:
            made[family, method] = quantize(vision(family), method, tmp_path_factory.mktemp(family) / method)
        return made[family, method]

    return make


def renamed(folder: Path, out: Path) -> Path:
    """The same checkpoint under the names of the model's own modules."""
    shutil.copytree(folder, out)
    skeleton = Skeleton(load_config(folder))
    view = CheckpointView(CheckpointReader(folder), skeleton)
    save_file({name: view.read(name) for name in view.names}, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_walk_of_the_decoder_gives_the_whole_models_hidden_states_bit_for_bit(
    family: str, vision: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    folder, read = vision(family), list[str]()
    monkeypatch.setattr(CheckpointReader, "read", lambda self, n, own=CheckpointReader.read: (read.append(n), own(self, n))[1])
    tokens = torch.randint(3, 119, (3, 32), generator=torch.Generator().manual_seed(0))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    skeleton = Skeleton(load_config(folder))
    last = model.get_submodule(skeleton.path)[-1]
    last.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        walked = run_blocks(folder, tokens, 2)
        for batch in tokens.split(2):
            model(batch, use_cache=False)
    assert all(torch.equal(a, b) for a, b in zip(walked, seen, strict=True))
    view = CheckpointView(CheckpointReader(folder), skeleton)
    assert set(read) <= {view.source(n) for n in view.names if n.startswith(f"{skeleton.trunk_path}.")}


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_groups_of_the_text_family_are_those_that_a_dry_run_finds(family: str, vision: Callable[..., Path]) -> None:
    skeleton = Skeleton(load_config(vision(family)))
    table = {frozenset(g) for g in skeleton.groups(0)}
    assert {n for g in table for n in g} == set(skeleton.linears(0))
    skeleton.family = None
    view = CheckpointView(CheckpointReader(vision(family)), skeleton)
    assert len(list(skeleton.embed(view, torch.randint(3, 119, (1, 16)), 1, "cpu", torch.float32))) == 1
    assert {frozenset(g) for g in skeleton.groups(0)} == table


@pytest.mark.parametrize("family", NAMED)
def test_the_gradient_at_the_head_is_that_of_the_whole_model_on_text(family: str, vision: Callable[..., Path]) -> None:
    skeleton = Skeleton(load_config(vision(family)))
    head = Head(skeleton, CheckpointView(CheckpointReader(vision(family)), skeleton), torch.float64)
    model = compress.load(vision(family), dtype=torch.float64)
    tokens = torch.randint(3, 119, (2, 24), generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    last: Any = model.get_submodule(skeleton.path)[-1]  # type: ignore[index]
    last.register_forward_hook(lambda _m, _a, out: seen.append(out) or out.retain_grad())
    logits = model(tokens).logits[:, :-1].transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)
    losses.sum().backward()
    loss, gradient = head.gradient(seen[0].detach(), tokens)
    assert torch.allclose(loss, losses, atol=1e-6)  # norms compute in fp32 inside the models
    assert distance(gradient, seen[0].grad) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", NAMED)
def test_every_method_compresses_the_language_part_and_nothing_else(
    family: str, method: str, vision: Callable[..., Path], artifact: Callable[..., Path]
) -> None:
    out = artifact(family, method)
    assert verify(out) == []
    assert verify_deep(out, vision(family)) == []
    model, dense = (compress.load(f, dtype=torch.float32, exact=True) for f in (out, vision(family)))
    assert type(model) is type(dense)
    assert not model.training
    packed = [n for n, m in model.named_modules() if isinstance(m, CompressedLinear)]
    assert len(packed) == 14
    assert all(n.startswith("model.language_model.layers.") for n in packed)
    linears = {n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(settings["ignore"]) == linears - set(packed)
    assert 0 < distance(logits(model, family), logits(dense, family)) < 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", NAMED)
def test_image_and_text_give_the_logits_of_the_dequantized_weights(
    family: str, method: str, artifact: Callable[..., Path], tmp_path: Path
) -> None:
    out = artifact(family, method)
    reader, linears = CheckpointReader(out), manifest.read(out)["linears"]
    tensors = {n: reader.read(n) for n in reader.names if n.rpartition(".")[0] not in linears or n.endswith(".bias")}
    tensors |= {f"{name}.weight": unpack(reader, name, entry) for name, entry in linears.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    packed, plain = (compress.load(f, dtype=torch.float32, exact=True) for f in (out, tmp_path))
    assert distance(logits(packed, family), logits(plain, family)) < 1e-5  # sums in another order


STOCK = WITHOUT_US + """
import torch
from transformers import AutoModelForImageTextToText
for folder, given, out in zip(*[iter(sys.argv[1:])] * 3):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(given)).logits, out)
"""


def test_stock_transformers_gives_our_logits_for_image_and_text(
    vision: Callable[..., Path], artifact: Callable[..., Path], tmp_path: Path
) -> None:
    cases = [(f, artifact(f, m)) for f in NAMED for m in METHODS]
    cases += [(f, quantize(vision(f), "rtn", tmp_path / f, symmetric=False)) for f in NAMED]
    arguments = []
    for number, (family, folder) in enumerate(cases):
        torch.save(inputs(family), tmp_path / f"{number}.in")
        arguments += [folder, tmp_path / f"{number}.in", tmp_path / f"{number}.pt"]
    done = python(STOCK, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "UNEXPECTED" not in done.stdout + done.stderr
    assert "MISSING" not in done.stdout + done.stderr
    for number, (family, folder) in enumerate(cases):
        own = logits(compress.load(folder, dtype=torch.float32, exact=True), family)
        assert torch.equal(own, torch.load(tmp_path / f"{number}.pt"))


@pytest.mark.parametrize("family", [*NAMED, "llava_next", "mistral3"])
def test_old_and_new_tensor_names_give_the_same_artifact(family: str, vision: Callable[..., Path], tmp_path: Path) -> None:
    old, new = vision(family), renamed(vision(family), tmp_path / "new")
    assert load_file(old / "model.safetensors").keys() != load_file(new / "model.safetensors").keys()
    a, b = (load_file(quantize(f, "rtn", tmp_path / f"{i}") / "model.safetensors") for i, f in enumerate((old, new)))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("family", NAMED)
def test_an_artifact_with_old_tensor_names_loads(
    family: str, vision: Callable[..., Path], artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """As llm-compressor writes them."""
    shutil.copytree(artifact(family, "rtn"), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    ours = load_file(tmp_path / "out" / "model.safetensors")

    def back(name: str) -> str:
        if family != "llava":
            return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        name = name.replace("model.language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
        return name.removeprefix("model.")

    assert {back(n) for n in ours if "_proj" not in n} <= load_file(vision(family) / "model.safetensors").keys()
    save_file({back(n): t for n, t in ours.items()}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    a, b = (compress.load(f, dtype=torch.float32, exact=True) for f in (artifact(family, "rtn"), tmp_path / "out"))
    assert torch.equal(logits(a, family), logits(b, family))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_rotation_leaves_the_logits_of_image_and_text_unchanged(family: str, tied: bool, vision: Callable[..., Path]) -> None:
    from transformers import AutoModelForImageTextToText

    found = []
    for seed in (None, 5):
        config = load_config(vision(family, tied))
        untied = seed is not None and rotate.untie(config)
        skeleton, reader = Skeleton(config), CheckpointReader(vision(family, tied))
        view = CheckpointView(reader, skeleton) if seed is None else rotate.RotatedView(reader, skeleton, seed, untied)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
        state = {n: view.read(n).double() for n in view.names}
        for name in state:  # pieces are the whole
            whole = torch.cat(list(view.chunks(name))).double()
            assert torch.allclose(whole.view(state[name].shape), state[name], rtol=1e-6, atol=1e-7)
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        model.tie_weights()
        given = {k: v.double() if v.is_floating_point() else v for k, v in inputs(family).items()}
        with torch.no_grad():
            found.append(model(**given).logits)
    assert distance(found[1], found[0]) < 1e-4  # rotated tensors are read in fp32


def test_a_tied_model_is_rotated_and_loads_in_stock_transformers(vision: Callable[..., Path], tmp_path: Path) -> None:
    arguments = []
    for family in NAMED:
        quantize(vision(family, True), "rsq", tmp_path / family)
        assert verify(tmp_path / family) == []
        torch.save(inputs(family), tmp_path / f"{family}.in")
        arguments += [tmp_path / family, tmp_path / f"{family}.in", tmp_path / f"{family}.pt"]
    done = python(STOCK, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    for family in NAMED:
        own = logits(compress.load(tmp_path / family, dtype=torch.float32, exact=True), family)
        assert torch.equal(own, torch.load(tmp_path / f"{family}.pt"))
        assert distance(own, logits(compress.load(vision(family, True), dtype=torch.float32), family)) < 0.5


def test_a_guarded_artifact_loads_through_transformers_auto_class(
    vision: Callable[..., Path], artifact: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    compress.register()
    for family in NAMED:
        shutil.copytree(artifact(family, "rtn"), tmp_path / family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["format"] = "compress-int_grouped"
        (tmp_path / family / "config.json").write_text(json.dumps(config))
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
        own = compress.load(artifact(family, "rtn"), dtype=torch.float32)
        assert torch.equal(logits(model, family), logits(own, family))


@pytest.mark.parametrize("format", ["awq", "dense"])
@pytest.mark.parametrize("family", NAMED)
def test_other_formats_hold_a_language_part_too(family: str, format: str, vision: Callable[..., Path], tmp_path: Path) -> None:
    quantize(vision(family), "rtn", tmp_path / "out", format=format, symmetric=False)
    assert verify(tmp_path / "out") == []
    model, dense = (compress.load(f, dtype=torch.float32) for f in (tmp_path / "out", vision(family)))
    assert 0 < distance(logits(model, family), logits(dense, family)) < 0.5


@pytest.mark.parametrize("family", NAMED)
def test_half_precision_stays_half_in_every_part(family: str, vision: Callable[..., Path], tmp_path: Path) -> None:
    compress.load(vision(family), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    quantize(tmp_path / "half", "rtn", tmp_path / "out")
    for dtype in (torch.bfloat16, torch.float32):
        model = compress.load(tmp_path / "out", dtype=None if dtype == torch.bfloat16 else dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(family).items()}
        with torch.no_grad():
            assert model(**given).logits.isfinite().all()


@pytest.mark.parametrize(("family", "why"), [("qwen3_vl", "cannot be rotated"), ("video_llava", "image embeddings is not known")])
def test_what_cannot_be_rotated_exactly_is_refused(family: str, why: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(CompressError, match=why):
        rotate.untie(AutoConfig.for_model(family))


def test_a_model_whose_text_decoder_is_not_apart_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "opt", "vocab_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, **small}
    config = {"model_type": "blip-2", "text_config": text, "vision_config": small, "qformer_config": small}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match="text decoder was not found"):
        Skeleton(load_config(tmp_path))


def test_a_tensor_that_lies_there_under_both_names_is_not_silently_dropped(vision: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(vision("llava"), tmp_path / "twice")
    tensors = load_file(tmp_path / "twice" / "model.safetensors")
    twin = {"model.language_model.norm.weight": tensors["language_model.model.norm.weight"] + 1}
    save_file(tensors | twin, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    skeleton = Skeleton(load_config(tmp_path / "twice"))
    view = CheckpointView(CheckpointReader(tmp_path / "twice"), skeleton)
    assert view.extra == ["language_model.model.norm.weight"]
    assert torch.equal(view.read("model.language_model.norm.weight"), *twin.values())

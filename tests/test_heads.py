"""`--lm-head-bits`: embedding and head rounded, in one tensor where they are tied."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE, STOCK_LOGITS, VALID, Outcome, python, tree
from safetensors.torch import load_file, save_file

import compress
from compress import audit
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.formats import int_grouped
from compress.methods._quantizer import Grid, fake
from compress.modules import CompressedEmbedding, TiedLinear
from compress.types import Packed

IDS = [[5, 17, 99, 64, 33, 21, 8]]
TABLE, HEAD = "model.embed_tokens", "lm_head"


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = compress.load(folder, dtype=torch.float32, exact=True, **options)
    with torch.no_grad():
        out: torch.Tensor = model(torch.tensor(IDS)).logits
    return out


def text(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
    return {"dataset": tmp_path / "text.txt", "nsamples": 2, "seqlen": 32}


def tied(folder: Path, tmp_path: Path) -> Path:
    """The model with its embedding as its head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in CheckpointReader(tmp_path / "tied")
    return tmp_path / "tied"


def stored(folder: Path, name: str) -> torch.Tensor:
    """The dense weight of a rounded table."""
    entry = json.loads((folder / "manifest.json").read_text())["heads"][name]
    reader, shape = CheckpointReader(folder), (entry["shape"][0], entry["shape"][1])
    tensors = {s: reader.read(f"{name}.{s}") for s in int_grouped.spec(entry["params"], shape, "F32")}
    return int_grouped.dequantize(Packed("int_grouped", 1, entry["params"], tensors, shape))


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "gwq", "rsq"])
def test_every_integer_method_rounds_them_and_the_dense_artifact_holds_the_same_numbers(
    method: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    source = tied(pico("llama"), tmp_path)
    options = {"bits": 4, "group_size": 32, "lm_head_bits": 8, **(text(tmp_path) if method != "rtn" else {})}
    for form in ("pack-quantized", "dense"):
        compress.quantize(source, method, tmp_path / form, format=form, **options)
    heads = json.loads((tmp_path / "pack-quantized" / "manifest.json").read_text())["heads"]
    assert set(heads) == ({TABLE, HEAD} if method == "rsq" else {TABLE})  # a rotation unties
    assert all(entry["params"]["bits"] == 8 and 0 < entry["error"] < 0.01 for entry in heads.values())
    assert torch.equal(logits(tmp_path / "pack-quantized"), logits(tmp_path / "dense"))
    for form in ("pack-quantized", "dense"):
        assert audit.verify(tmp_path / form) == []
        assert audit.verify_deep(tmp_path / form, source) == []
    spoil(tmp_path / "pack-quantized" / "model.safetensors", f"{TABLE}.weight_scale")
    assert audit.verify_deep(tmp_path / "pack-quantized", source) != []


def spoil(file: Path, name: str) -> None:
    """Make one tensor of a file twice what it was."""
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name] * 2}, file, {"format": "pt"})


@pytest.mark.parametrize(("bits", "symmetric", "head"), [(4, True, True), (4, False, False), (8, False, True), (8, True, True)])
def test_the_table_is_the_nearest_on_the_clipped_grid_however_it_is_cut(
    bits: int, symmetric: bool, head: bool, pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.pipeline import heads

    monkeypatch.setattr(heads, "_PIECE", 40 * 64)  # 32 rows at a time, of 128
    compress.quantize(pico("llama"), "rtn", tmp_path / "out", group_size=32, symmetric=symmetric, lm_head_bits=bits)
    for name in (TABLE, HEAD):
        W, grid = CheckpointReader(pico("llama")).read(f"{name}.weight"), Grid(bits, 32, head, torch.float32, mse_clip=bits == 4)
        assert torch.equal(stored(tmp_path / "out", name), fake(W, grid))


def test_what_is_rotated_is_rounded_after_the_rotation(pico: Callable[..., Path], tmp_path: Path) -> None:
    from compress.models import rotate
    from compress.models.skeleton import load_config
    from compress.types import Rotate

    compress.quantize(pico("llama"), "rsq", tmp_path / "out", group_size=32, lm_head_bits=8, **text(tmp_path))
    _, view = rotate.open_model(pico("llama"), load_config(pico("llama")), Rotate(0))
    for name in (TABLE, HEAD):
        W, grid = view.read(f"{name}.weight"), Grid(8, 32, True, torch.float32)
        assert float((stored(tmp_path / "out", name) - W).norm() / W.norm()) < 0.01
        assert not torch.equal(W, CheckpointReader(pico("llama")).read(f"{name}.weight"))
        assert torch.allclose(stored(tmp_path / "out", name), fake(W, grid), atol=1e-6)


PORTABLE: list[dict[str, Any]] = [
    {"symmetric": True, "lm_head_bits": 4}, {"symmetric": False, "lm_head_bits": 4},
    {"symmetric": True, "lm_head_bits": 8, "lm_head_only": True},
]  # fmt: skip
REFUSED = """
for number in range(int(sys.argv[5])):
    try:
        AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/refused{number}")
    except Exception as error:
        assert "compress-int_grouped" in str(error), error
    else:
        raise SystemExit(f"{number} was loaded")
"""


def test_stock_transformers_reads_with_equal_logits_what_it_can_and_refuses_the_rest(
    pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    for number, options in enumerate(PORTABLE):
        compress.quantize(pico("llama"), "rtn", tmp_path / str(number), bits=4, group_size=32, **options)
        assert "lm_head.weight_packed" in CheckpointReader(tmp_path / str(number))
        assert "transformers:  yes" in cli("inspect", tmp_path / str(number)).out
    cases = [(tied(pico("llama"), tmp_path), True, 4), (pico("llama"), True, 8), (pico("llama"), False, 8)]
    for number, (source, symmetric, bits) in enumerate(cases):
        out = tmp_path / f"refused{number}"
        compress.quantize(source, "rtn", out, bits=4, group_size=32, symmetric=symmetric, lm_head_bits=bits)
        assert "it refuses compress-int_grouped on purpose" in cli("inspect", out).out
    done = python(STOCK_LOGITS + REFUSED, tmp_path, tmp_path / "{}.pt", json.dumps(IDS), len(PORTABLE), len(cases))
    assert done.returncode == 0, done.stderr[-2000:]
    for number in range(len(PORTABLE)):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt", weights_only=True), logits(tmp_path / str(number)))


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "gpt2", "opt", "qwen3", "phi3"])
def test_families_that_scale_tie_or_spell_them_otherwise(family: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    for form in ("pack-quantized", "dense"):
        compress.quantize(pico(family), "rtn", tmp_path / form, group_size=32, lm_head_bits=8, format=form)
    assert torch.equal(logits(tmp_path / "pack-quantized"), logits(tmp_path / "dense"))


def test_a_tied_table_is_one_tensor_for_both(pico: Callable[..., Path], tmp_path: Path) -> None:
    compress.quantize(tied(pico("llama"), tmp_path), "rtn", tmp_path / "out", group_size=32, lm_head_bits=8)
    model = compress.load(tmp_path / "out")
    assert isinstance(model.get_input_embeddings(), CompressedEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedLinear)
    on_disk = CheckpointReader(tmp_path / "out")
    assert model.state_dict().keys() == set(on_disk.names)
    assert all(torch.equal(t, on_disk.read(n)) for n, t in model.state_dict().items())
    with torch.no_grad():
        want = model(torch.tensor(IDS)).logits
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(compress.load(tmp_path / "saved")(torch.tensor(IDS)).logits, want)


@pytest.mark.parametrize("beyond", [-1, -100, 128])
def test_a_token_beyond_the_table_is_an_error_as_in_torch(beyond: int, pico: Callable[..., Path], tmp_path: Path) -> None:
    compress.quantize(pico("llama"), "rtn", tmp_path / "out", group_size=32, lm_head_bits=8)
    model = compress.load(tmp_path / "out")
    for embedding in (model.get_input_embeddings(), torch.nn.Embedding(128, 64)):
        assert embedding(torch.tensor([[0, 127]])).shape == (1, 2, 64)
        assert embedding(torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, 64)
        with pytest.raises(IndexError):
            embedding(torch.tensor([[5, beyond]]))


def test_from_pretrained_reads_a_tied_table_after_register(pico: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress.quantize(tied(pico("llama"), tmp_path), "rtn", tmp_path / "out", group_size=32, lm_head_bits=4)
    compress.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(model.lm_head, TiedLinear)
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor(IDS)).logits, logits(tmp_path / "out"), atol=1e-4)


def test_a_run_killed_while_it_rounds_the_table_resumes_to_the_same_bytes(pico: Callable[..., Path], tmp_path: Path) -> None:
    from compress.checkpoint.writer import CheckpointWriter
    from compress.pipeline import heads

    source, options = pico("llama"), {"group_size": 32, "lm_head_bits": 8}
    compress.quantize(source, "rtn", tmp_path / "whole", **options)
    child = os.fork()
    if child == 0:  # pragma: no cover
        real = CheckpointWriter.write_piece

        def write_piece(self: CheckpointWriter, name: str, start: int, piece: torch.Tensor) -> None:
            real(self, name, start, piece)
            if name.startswith(TABLE) and start:
                os.kill(os.getpid(), signal.SIGKILL)

        CheckpointWriter.write_piece, heads._PIECE = write_piece, 32 * 64  # type: ignore[method-assign]
        try:
            compress.quantize(source, "rtn", tmp_path / "out", **options)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert json.loads((tmp_path / "out.partial" / "progress.json").read_text())["done"] == 2
    assert compress.quantize(source, "rtn", tmp_path / "out", **options).resumed
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_the_command_line_end_to_end(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    args = ["quantize", EXAMPLE, "-m", "rtn", "--bits", 4, "--group-size", 32]
    for bits in (None, 8):
        head = [] if bits is None else ["--lm-head-bits", bits]
        assert cli(*args, *head, "-o", tmp_path / str(bits)).code == 0
    predicted = json.loads(cli(*args, "--lm-head-bits", 8, "--dry-run", "--json").out)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("None", "8")}
    assert sizes["8"] == predicted["artifact_bytes"]
    table = 32000 * 288
    assert sizes["None"] - sizes["8"] == pytest.approx(table * (16 - 8 - 16 / 32) / 8, rel=1e-3)
    shown = cli("inspect", tmp_path / "8").out
    assert "model.embed_tokens at 8 bits" in shown
    assert "18.43 MB at 16 bits" in shown
    assert cli("verify", tmp_path / "8", "--deep", "--source", EXAMPLE).code == 0
    done = cli("generate", tmp_path / "8", "--prompt", "Once upon a time", "--max-new-tokens", 10)
    assert "there was" in done.out
    found = {}
    for name in ("None", "8"):
        shown = cli("eval", tmp_path / name, "--text", VALID, "--windows", 2, "--batch-size", 2, "--json").out
        found[name] = json.loads(shown)["metrics"][0]["value"]
    assert found["8"] == pytest.approx(found["None"], rel=0.01)


def test_pruned_and_factorized_models_have_rounded_heads_too(pico: Callable[..., Path], tmp_path: Path) -> None:
    source, then = pico("llama"), {"then_bits": 4, "then_group_size": 32, "then_method": "rtn"}
    compress.prune(source, "magnitude", tmp_path / "p", pattern="2:4", lm_head_bits=8, **then)
    compress.factorize(source, "svd", tmp_path / "f", keep=0.5, lm_head_bits=4)
    for name in ("p", "f"):
        model = compress.load(tmp_path / name)
        assert isinstance(model.get_input_embeddings(), CompressedEmbedding)
        assert bool(model(torch.tensor(IDS)).logits.isfinite().all())
        with pytest.raises(CompressError, match="already compressed"):
            compress.quantize(tmp_path / name, "rtn", tmp_path / "again", group_size=32)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lm_head_bits": 5}, "5 is not supported"),
        ({"lm_head_only": True}, "goes with --lm-head-bits"),
        ({"lm_head_bits": 8, "format": "awq"}, "keeps the head dense"),
        ({"lm_head_bits": 8, "lm_head_only": True, "tied": True}, "are one tensor"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(
    options: dict[str, Any], why: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    source = tied(pico("llama"), tmp_path) if options.pop("tied", False) else pico("llama")
    with pytest.raises(CompressError, match=why):
        compress.quantize(source, "rtn", tmp_path / "out", group_size=32, **options)
    with pytest.raises(CompressError, match="then-bits"):
        compress.prune(pico("llama"), "magnitude", tmp_path / "out", lm_head_bits=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gathered_rows_are_the_references(bits: int, symmetric: bool) -> None:
    from compress_kernels import int_grouped as kernel

    g = torch.Generator().manual_seed(bits)
    O, I, G = 77, 96, 3
    q, zero = (torch.randint(0, 1 << bits, (O, n), generator=g, dtype=torch.uint8) for n in (I, G))
    packed = int_grouped.pack(q, torch.rand(O, G, generator=g), None if symmetric else zero, bits=bits, group_size=32)
    index = torch.tensor([0, 76, 10, 10, 31, 32, 63, 64])
    got = kernel.rows(packed.tensors, packed.params, (O, I), index)
    assert torch.equal(got, int_grouped.dequantize(packed)[index])
    assert kernel.rows(packed.tensors, packed.params, (O, I), index[:0]).shape == (0, I)

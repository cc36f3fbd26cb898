"""Fixtures: the shipped checkpoint, pico models of every family, and the command line in this process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread only waits
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: no GPU here (tests/test_triton.py)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "stories15M"
CALIBRATION = ROOT / "examples" / "data" / "tinystories-calibration.txt"
VALID = ROOT / "examples" / "data" / "tinystories-valid.txt"

_SMALL: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1,
                          "eos_token_id": 2, "pad_token_id": 127, "max_position_embeddings": 64}  # fmt: skip
_LLAMA = {**_SMALL, "intermediate_size": 128, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 32},
    "gemma": {**_LLAMA, "head_dim": 16},
    "gemma2": {**_LLAMA, "head_dim": 32, "sliding_window": 8},
    "gemma3_text": {
        **_LLAMA,
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": _LLAMA,
    "opt": {**_SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {**_SMALL, "n_inner": 128},
}
GENERIC: dict[str, dict[str, Any]] = {
    "stablelm": _LLAMA,
    "gptj": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    "cohere": _LLAMA,
    "starcoder2": _LLAMA,
}


def outliers(model: torch.nn.Module) -> None:
    """Give a random model what real ones have: norms with a few large channels, non-zero biases."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data += torch.randn(p.shape, generator=generator) * 0.1
            if "norm" in name or "ln_" in name:
                p.data[::17] *= 4


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A saved random model of a family, with the example's tokenizer left out: tokens come from a fake one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[tuple[str, str], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        key = (family, str(dtype))
        if key not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **(FAMILIES | GENERIC)[family])
            model = AutoModelForCausalLM.from_config(config)
            outliers(model)
            made[key] = tmp_path_factory.mktemp(family)
            model.to(dtype).save_pretrained(made[key])
            _save_tokenizer(made[key])
        return made[key]

    return make


def _save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 128 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:124]
    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(autouse=True, scope="session")
def untuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No table of kernel paths that this machine's user may have measured."""
    from compress_kernels import dispatch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "folder", lambda: tmp_path_factory.getbasetemp() / "no tables")
        yield


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli() -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*args: object) -> Outcome:
        from compress.cli import main

        out, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main([str(a) for a in args])
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


def python(code: str, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python snippet in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **kwargs,
    )


# Begins a snippet whose process cannot import our packages.
WITHOUT_US = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("compress", "compress_kernels"):
            raise ImportError("not in this process: " + name)
sys.meta_path.insert(0, Refuse())
"""

# Stock transformers loads argv[1] and saves its logits of the token ids argv[3] (JSON) in argv[2]; argv[4]: of so many folders.
STOCK_LOGITS = (
    WITHOUT_US
    + """
import json
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[3]))
count = int(sys.argv[4]) if len(sys.argv) > 4 else None  # folders 0 … count - 1 of a folder
for number in range(count or 1):
    folder = sys.argv[1] if count is None else f"{sys.argv[1]}/{number}"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        first = model(ids).logits
        again = model(ids).logits
    assert torch.equal(first, again)
    assert not [m for m in sys.modules if m.split(".")[0] in ("compress", "compress_kernels")]
    torch.save(first, sys.argv[2].format(number))
"""
)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_and_threads_change_no_bit(product: Callable[[Any], Any], x: Any) -> None:
    """The product of x (M, I) equals those of its rows, and that with two threads, bit for bit."""
    import torch

    whole = product(x)
    assert torch.equal(whole, torch.cat([product(x[i : i + 1]) for i in range(len(x))]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(whole, product(x))
    finally:
        torch.set_num_threads(threads)

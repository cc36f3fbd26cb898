"""Fine-tune one small checkpoint on several local texts: real fine-tunes of one base, for `compress bundle` and `compress merge`.

Every parameter is trained (AdamW in float32, bfloat16 autocast on a GPU; warm-up, then a cosine to a tenth), from a fixed seed.
Each result is an ordinary Hugging Face folder in the base's dtype, OUT/NAME, with the held-out text, OUT/NAME/valid.txt, in it;
OUT/finetunes.json has the settings and both perplexities. A fine-tune that is there already, of the same settings, is kept.

    python examples/make_finetunes.py --corpus shakespeare=shakespeare.txt --corpus legal=bills.jsonl --out out/finetunes
    python examples/make_finetunes.py --base out/SmolLM2-135M-Instruct --lr 5e-5 --steps 500 --out out/smollm2-ft
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import corpus
import torch

from compress import calibration
from compress.checkpoint import source
from compress.checkpoint.writer import write_json
from compress.errors import CompressError
from compress.evaluation.perplexity import perplexity, windows

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {"encyclopedia": ROOT / "benchmarks/data/wikitext2-test-head.txt", "web": ROOT / "compress/data/calibration.txt"}
TABLE = "finetunes.json"
HELD_OUT = 60_000  # characters


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=str(ROOT / "examples/stories15M"), help="folder or hub id to start from")
    parser.add_argument("--out", type=Path, default=Path("out/finetunes"), help="folder that gets one folder per corpus")
    parser.add_argument(
        "--corpus", action="append", metavar="NAME=PATH",
        help=".txt, .jsonl with `text`, or a folder of them; once per fine-tune; default: " + ", ".join(DEFAULTS),
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (150)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step (4)")
    parser.add_argument("--seqlen", type=int, help="tokens per window (min(512, the context))")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (3e-4)")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of matrices (0.01)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    return parser.parse_args()


def corpora(given: list[str] | None) -> dict[str, Path]:
    """Name -> path of what shall be trained on."""
    if not given:
        found = {name: path for name, path in DEFAULTS.items() if path.is_file()}
        if not found:
            raise CompressError("no text to train on", hint="give --corpus NAME=PATH")
        return found
    out: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise CompressError(f"--corpus {one}: not NAME=PATH", hint="for example --corpus legal=bills.jsonl")
        if name in out:
            raise CompressError(f"--corpus {name}: named twice", hint="give each its own name")
        if not Path(path).exists():
            raise CompressError(f"--corpus {name}: no such file or folder: {path}", hint="check the path")
        out[name] = Path(path)
    return out


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate at a step: a tenth of the steps upwards, then a cosine to 0.1."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(model: Any, tokens: torch.Tensor, options: argparse.Namespace, name: str) -> float:
    """Train every parameter of a float32 model on the windows (N, T); the mean loss of the last tenth of the steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.steps))
    model.train()
    losses: list[float] = []
    for step, ids in enumerate(corpus.batches(tokens, options.batch_size, options.steps, options.seed)):
        ids = ids.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise CompressError(f"{name}: the loss is {losses[-1]} at step {step}", hint="use a smaller --lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 10) == 0:
            print(f"{name}: step {step}, loss {losses[-1]:.3f}", file=sys.stderr)
    model.eval()
    last = losses[-max(1, options.steps // 10) :]
    return math.fsum(last) / len(last)


def load(folder: Path, device: str) -> Any:
    """A checkpoint in float32, whatever its stored dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def save(model: Any, base: Path, dtype: torch.dtype, valid: str, out: Path) -> None:
    """An ordinary folder: weights rounded to `dtype`, the base's tokenizer and notices, the held-out text."""
    model = model.to("cpu", dtype)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CompressError(f"{name}: NaN or Inf in {dtype}", hint="use a smaller --lr")
    model.config.dtype = dtype
    part = out.with_name(f".{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    for file in source.companions(base):
        if not (part / file.name).exists():
            shutil.copyfile(file, part / file.name)
    (part / "valid.txt").write_text(valid, encoding="utf-8")
    part.rename(out)


def main() -> None:
    """Train, save and measure every corpus."""
    options = parse()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = corpora(options.corpus)
    base = source.resolve(options.base)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    tokenizer = calibration.load_tokenizer(base)
    model = load(base, device)
    context = calibration.context_length(model.config)
    options.seqlen = options.seqlen or min(512, context)
    if not 2 <= options.seqlen <= context:
        raise CompressError(f"--seqlen {options.seqlen}: the model's context is {context}", hint=f"use 2..{context}")
    dtype = transformers.AutoConfig.from_pretrained(base).dtype or torch.float32
    options.out.mkdir(parents=True, exist_ok=True)
    table = json.loads((options.out / TABLE).read_text()) if (options.out / TABLE).is_file() else {}
    print(f"{'fine-tune':16s} {'tokens':>9s} {'base':>9s} {'tuned':>9s}   held-out perplexity, {device}")
    for name, path in names.items():
        row, out = table.get(name), options.out / name
        texts, valid = corpus.split(path, HELD_OUT, options.seed)
        digest = hashlib.sha256("\0".join([*texts, valid]).encode()).hexdigest()
        keys = ("steps", "batch_size", "seqlen", "lr", "weight_decay", "seed")
        settings = {"base": base.name, "text_sha256": digest} | {key: getattr(options, key) for key in keys}
        if out.exists() and (row is None or row["settings"] != settings):
            raise CompressError(f"{out}: exists, made with other settings", hint="remove it, or choose another --out")
        if not out.exists():
            row = one(load(base, device), model, tokenizer, name, (base, dtype, device), (texts, valid), options)
            table[name] = row | {"settings": settings}
            write_json(options.out / TABLE, table)
        print(f"{name:16s} {row['tokens']:9d} {row['base']:9.3f} {row['tuned']:9.3f}   {row['seconds']:.0f} s", flush=True)


def one(
    model: Any, dense: Any, tokenizer: Any, name: str, where: tuple[Path, torch.dtype, str], text: tuple[list[str], str],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune `model` on (training documents, held-out text), save it, and measure what was saved beside the base."""
    base, dtype, device = where
    start = time.perf_counter()
    tokens = windows("\n\n".join(text[0]), tokenizer, options.seqlen)
    held = windows(text[1], tokenizer, options.seqlen)
    before = perplexity(dense, held, options.batch_size)[0]
    loss = train(model, tokens, options, name)
    save(model, base, dtype, text[1], options.out / name)
    after = perplexity(load(options.out / name, device), held, options.batch_size)[0]
    seen = options.steps * options.batch_size * options.seqlen
    seconds = round(time.perf_counter() - start, 1)
    return {"base": before, "tuned": after, "train_loss": loss, "tokens": seen, "windows": len(held), "seconds": seconds}


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))

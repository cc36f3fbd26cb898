"""Train a small Llama from scratch on local text with full-rank, low-rank and LOST layers, and compare them at equal steps.

    full           ordinary linears
    low-rank       B SiLU(A x), random factors (CoLA's start), with as many parameters as LOST
    low-rank-svd   the same from the SVD of the full-rank weight: what of LOST's difference is its start, not its columns
    lost           gamma * B SiLU(A x) + (1 - gamma) * W_s x_I (arXiv 2508.02668)

All begin with the same weights, see the same batches and have the same optimizer (AdamW, betas 0.9 and 0.95, decay 0.01 on
matrices, clipped at 0.5, warm-up, then a cosine to a tenth). OUT/log.jsonl has the loss curves, OUT/table.json the table, OUT/NAME
the trained models: artifacts that `compress eval` and `generate` read, and an ordinary folder of the full-rank one.

    python examples/pretrain_lost.py --out out/pretrain
    compress generate out/pretrain/lost --prompt "The"
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import corpus
import torch

from compress import loading, training
from compress.checkpoint.writer import write_json
from compress.errors import CompressError, nearest
from compress.evaluation.perplexity import perplexity, windows
from compress.modules import linear_shape
from compress.pipeline import memory

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "compress/data/calibration.txt"  # 1.8 MB of C4, the paper's corpus
RATES = {"full": 3e-3, "low-rank": 3e-3, "low-rank-svd": 6e-3, "lost": 6e-3}  # the better of the two in docs/lost.md
HELD_OUT = 40_000  # characters
Data = tuple[torch.Tensor, torch.Tensor]  # windows (N, T) to train on, and held-out ones


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", type=Path, default=TEXT, help=".txt, .jsonl with `text`, or a folder of them; default: the built-in C4 sample")
    add("--out", type=Path, default=Path("out/pretrain"), help="folder for models, log and table; must be new or empty")
    add("--variants", default=",".join(RATES), help="which to train, with commas")
    add("--hidden", type=int, default=128)
    add("--intermediate", type=int, default=344)
    add("--blocks", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--vocabulary", type=int, default=1024, help="of the byte-level BPE that is trained on the text")
    add("--seqlen", type=int, default=128)
    add("--batch-size", type=int, default=16)
    add("--steps", type=int, default=300)
    add("--lr", type=float, help="highest learning rate of every variant (default: each its own)")
    add("--rank", type=int, default=32, help="of LOST's factors; a quarter of the hidden size, as CoLA's")
    add("--delta", type=float, default=0.05, help="share of the input columns that LOST keeps")
    add("--gamma", type=float, default=0.7, help="weight of the low-rank path")
    add("--band", type=int, help="singular triplets that choose the columns (all after the first RANK)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


def make_tokenizer(text: str, size: int) -> Any:
    """A byte-level BPE of `size` entries, trained on the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_model(options: argparse.Namespace, vocabulary: int) -> Any:
    """A freshly initialised Llama, the same for every variant."""
    from transformers import LlamaConfig, LlamaForCausalLM

    spread = 0.02 * (512 / options.hidden) ** 0.5  # the gain of the paper's smallest model, which is 512 wide with 0.02
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks, num_attention_heads=options.heads, num_key_value_heads=options.heads,
        max_position_embeddings=options.seqlen, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        initializer_range=spread,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return LlamaForCausalLM(config).float()


def matched(shapes: Mapping[str, tuple[int, int]], layers: Mapping[str, training.LostLinear]) -> dict[str, int]:
    """A rank per linear, so that low-rank layers together have LOST's parameters, to less than one rank; the rest is carried on."""
    ranks, rest = {}, 0
    for name, shape in shapes.items():
        rest += training.parameters(shape, layers[name].params["rank"], layers[name].params["kept"])
        ranks[name] = max(1, min(round(rest / sum(shape)), *shape))
        rest -= training.parameters(shape, ranks[name], 0)
    return ranks


def make_variant(name: str, dense: Any, options: argparse.Namespace) -> Any:
    """The dense model with its linears replaced as the variant says."""
    model = copy.deepcopy(dense)
    if name == "full":
        return model
    shapes = {n: shape for n, m in training.linears(model).items() if (shape := linear_shape(m)) is not None}
    layers = training.convert(model, options.rank, options.delta, options.gamma, band=options.band, seed=options.seed)
    if name == "lost":
        return model
    model = copy.deepcopy(dense)
    start = "svd" if name == "low-rank-svd" else "cola"
    training.convert(model, matched(shapes, layers), 0.0, 1.0, start=start, seed=options.seed)
    return model


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate at a step: a tenth of the steps upwards, then a cosine to 0.1."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Peak:
    """Memory that is used beyond what was there at the start: of the GPU, or of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        memory.trim()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = memory.rss()
            self.counted = _reset_peak()

    def value(self) -> int | None:
        """Bytes; None where the system does not say."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device)) - self.before
        if not self.counted:
            return None
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 - self.before


def _reset_peak() -> bool:
    """Begin to measure this process's peak anew (Linux); whether that is possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def train(name: str, model: Any, data: Data, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train one variant under accelerate; the model on the CPU, and its row of the table."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="bf16" if options.device == "cuda" else "no")
    peak, start = Peak(accelerator.device), time.perf_counter()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    top = options.lr or RATES[name]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=top, betas=(0.9, 0.95)))
    every = max(1, options.steps // 10)
    valid = math.nan
    with (options.out / "log.jsonl").open("a") as log:
        for step, ids in enumerate(corpus.batches(data[0], options.batch_size, options.steps, options.seed), 1):
            model.train()
            ids = ids.to(accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = top * rate(step - 1, options.steps)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(loss.item()):
                raise CompressError(f"{name}: the loss is {loss.item()} at step {step}", hint="use a smaller --lr")
            row: dict[str, Any] = {"variant": name, "step": step, "train": loss.item(), "lr": top * rate(step - 1, options.steps)}
            if step % every == 0 or step == options.steps:
                valid = perplexity(accelerator.unwrap_model(model), data[1], options.batch_size)[1]
                row["valid"] = valid
                print(f"{name}: step {step}, loss {loss.item():.3f}, held-out {valid:.4f}", file=sys.stderr)
            log.write(json.dumps(row) + "\n")
    bytes_peak, seconds = peak.value(), time.perf_counter() - start
    model = accelerator.unwrap_model(model).cpu().eval()
    accelerator.free_memory()
    count = sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "norm" not in n)
    return model, {
        "linears": inner, "parameters": count, "state": 16 * count, "peak": bytes_peak, "lr": top, "valid": valid,
        "perplexity": math.exp(valid), "seconds": round(seconds, 1),
    }  # fmt: skip


def store(name: str, model: Any, tokenizer: Any, options: argparse.Namespace) -> Path:
    """The trained model as a folder that `compress.load` reads: an artifact, or an ordinary checkpoint of the full-rank one."""
    out = options.out / name
    if name == "full":
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return out
    said = {key: getattr(options, key) for key in ("rank", "delta", "gamma", "band", "steps", "batch_size", "seqlen")}
    return training.save(model, out, tokenizer=tokenizer, config={"variant": name, **said}, seed=options.seed)


def main() -> None:
    """Train every variant, save it, and print the table."""
    options = parse()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = [name.strip() for name in options.variants.split(",")]
    for name in names:
        if name not in RATES:
            raise CompressError(f"variant {name!r} is unknown", hint=nearest(name, list(RATES)))
    if options.out.exists() and any(options.out.iterdir()):
        raise CompressError(f"{options.out}: not empty", hint="choose another --out, or remove it")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    texts, held = corpus.split(options.text, HELD_OUT, options.seed)
    text = "\n\n".join(texts)
    tokenizer = make_tokenizer(text, options.vocabulary)
    data = windows(text, tokenizer, options.seqlen), windows(held, tokenizer, options.seqlen)
    dense = make_model(options, len(tokenizer))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "valid.txt").write_text(held, encoding="utf-8")
    tokens = options.steps * options.batch_size * options.seqlen
    passes = tokens / data[0].numel()
    what = f"{tokens} tokens, {passes:.1f} passes over the text; {data[1].numel()} held out; {options.device}"
    print(f"{options.steps} steps, {what}")
    heads = "".join(f"{head:>10s}" for head in ("linears", "all", "state", "peak", "lr", "loss", "ppl", "stored"))
    print(f"{'variant':13s}{heads}")
    table = {}
    for name in names:
        model, row = train(name, make_variant(name, dense, options), data, options)
        served = loading.load(store(name, model, tokenizer, options), device="cpu", dtype=torch.float32, exact=True)
        row["stored"] = perplexity(served, data[1], options.batch_size)[1]
        table[name] = row
        peak = "?" if row["peak"] is None else f"{row['peak'] / 1e6:.0f} MB"
        print(
            f"{name:13s}{row['linears']:10d}{row['parameters']:10d}{row['state'] / 1e6:7.1f} MB{peak:>10s}{row['lr']:10.0e}"
            f"{row['valid']:10.4f}{row['perplexity']:10.2f}{row['stored']:10.4f}   {row['seconds']:.0f} s", flush=True,
        )  # fmt: skip
        del model, served
    write_json(options.out / "table.json", table)


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))

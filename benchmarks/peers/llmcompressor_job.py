"""One llm-compressor run, for comparison: quantize or prune a model in memory, then measure its perplexity.

Runs inside the peer's own environment (llmcompressor 0.14, CPU) and imports nothing from this project. The last line of
standard output is one JSON object (the only line with --json); everything else goes to standard error.

    python llmcompressor_job.py --model DIR --method awq --bits 4 --asymmetric --calibration FILE --text FILE --json
    python llmcompressor_job.py --model DIR --method sparsegpt --pattern 2:4 --calibration FILE --text FILE --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

STDOUT = sys.stdout


PRUNERS = ("sparsegpt", "wanda")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--method", choices=("rtn", "awq", "gptq", *PRUNERS), required=True)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument("--pattern", default="0:0", help="zeros of a pruning method as N:M; default: 50 %% unstructured")
    parser.add_argument("--group-size", type=int, default=64)
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--symmetric", dest="symmetric", action="store_true")
    symmetry.add_argument("--asymmetric", dest="symmetric", action="store_false")
    parser.add_argument("--calibration", type=Path, help="text file; needed for awq and gptq")
    parser.add_argument("--nsamples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--text", type=Path, required=True, help="text file to measure perplexity on")
    parser.add_argument("--windows", type=int, default=60, help="evaluation windows")
    parser.add_argument("--eval-seqlen", type=int, default=512, help="tokens in an evaluation window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()
    if arguments.method != "rtn" and arguments.calibration is None:
        parser.error(f"--method {arguments.method} needs --calibration")
    return arguments


def current_rss_gb() -> float:
    """Resident memory now, in GB (peak so far where /proc is missing)."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:
        return peak_rss_gb()


def peak_rss_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 1024) / 1e9


def windows_of(tokenizer: Any, path: Path, count: int, length: int) -> Any:
    """First non-overlapping windows of a text, without special tokens: an int64 tensor [count, length]."""
    import torch

    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * length:
        sys.exit(f"error: {path.name} has {len(ids)} tokens, {count} windows of {length} need {count * length}")
    return torch.tensor(ids[: count * length]).view(count, length)


def recipe_for(arguments: argparse.Namespace) -> list[Any]:
    """List the modifiers of the recipe: weights only, per group, every Linear but lm_head."""
    if arguments.method in PRUNERS:
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

        pruner = SparseGPTModifier if arguments.method == "sparsegpt" else WandaPruningModifier
        return [pruner(sparsity=0.5, mask_structure=arguments.pattern, targets=["Linear"], ignore=["re:.*lm_head"])]
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {
        "num_bits": arguments.bits,
        "type": "int",
        "symmetric": arguments.symmetric,
        "strategy": "group",
        "group_size": arguments.group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if arguments.method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    quantize = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    return [quantize] if arguments.method == "rtn" else [AWQModifier(), quantize]


def compress(model: Any, arguments: argparse.Namespace, calibration: Any) -> None:
    """Call llm-compressor's oneshot on the model, in place."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    options: dict[str, Any] = {"model": model, "recipe": recipe_for(arguments)}
    if calibration is not None:
        if not torch.accelerator.is_available():
            # 0.14 pins its cached activations unconditionally, which raises where there is no accelerator.
            IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
        samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration]
        options["dataset"] = torch.utils.data.DataLoader(samples, batch_size=1, shuffle=False)
        options["num_calibration_samples"] = len(samples)
        options["max_seq_length"] = arguments.seqlen
    oneshot(**options)


def check_quantized(model: Any, arguments: argparse.Namespace) -> int:
    """Check that each Linear of the blocks computes with quantized weights; return how many there are."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    generator = torch.Generator().manual_seed(0)
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights.num_bits != arguments.bits:
            sys.exit(f"error: {name} was not quantized")
        zero_point = getattr(module, "weight_zero_point", None)
        quantized = fake_quantize(module.weight, module.weight_scale, zero_point, scheme.weights)
        levels = quantized[0, : arguments.group_size].unique().numel()
        x = torch.randn(2, module.in_features, generator=generator)
        expected = torch.nn.functional.linear(x, quantized, module.bias)
        if levels > 2**arguments.bits or not torch.allclose(module(x), expected, rtol=1e-4, atol=1e-5):
            sys.exit(f"error: {name} does not compute with its {arguments.bits}-bit weights")
        count += 1
    if count == 0:
        sys.exit("error: no Linear was quantized")
    return count


def check_pruned(model: Any) -> int:
    """Check that half of each Linear of the blocks is zero; return how many there are."""
    import torch

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for name, module in linears:
        share = float((module.weight == 0).float().mean())
        if abs(share - 0.5) > 0.01:
            sys.exit(f"error: {name} has {share:.3f} zeros")
    return len(linears)


def perplexity(model: Any, windows: Any) -> float:
    """Exponential of the mean loss over the windows, each the mean over its T-1 predictions."""
    import torch

    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
    return math.exp(total / len(windows))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, compress, measure."""
    import llmcompressor
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe_for(arguments)  # imports what compression will use
    torch.set_num_threads(arguments.threads)
    baseline = current_rss_gb()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    evaluation = windows_of(tokenizer, arguments.text, arguments.windows, arguments.eval_seqlen)
    calibration = None
    if arguments.method != "rtn":
        calibration = windows_of(tokenizer, arguments.calibration, arguments.nsamples, arguments.seqlen)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()

    start = time.perf_counter()
    compress(model, arguments, calibration)
    seconds = time.perf_counter() - start
    peak = peak_rss_gb()

    with torch.no_grad():
        count = check_pruned(model) if arguments.method in PRUNERS else check_quantized(model, arguments)
        value = perplexity(model, evaluation)
    return {
        "method": arguments.method,
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "symmetric": arguments.symmetric,
        "pattern": arguments.pattern,
        "perplexity": round(value, 4),
        "seconds": round(seconds, 2),
        "peak_rss_gb": round(peak, 3),
        "baseline_rss_gb": round(baseline, 3),
        "linears": count,
        "threads": arguments.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "llmcompressor": llmcompressor.__version__,
        },
    }


def main() -> None:
    """Run with every library message on standard error, then print the result."""
    arguments = parse_arguments()
    with contextlib.redirect_stdout(sys.stderr):
        result = run(arguments)
    if not arguments.json:
        print(f"perplexity {result['perplexity']}, {result['seconds']} s, {result['peak_rss_gb']} GB", file=STDOUT)
    print(json.dumps(result), file=STDOUT)


if __name__ == "__main__":
    main()

"""Decode speed of a compressed model beside the dense one and llama.cpp, in turns on one machine.

    python benchmarks/decode.py ARTIFACT --dense MODEL [--llama-python PYTHON --gguf FILE] [--threads 2]
    python benchmarks/decode.py BUNDLE --base MODEL --task NAME [--mixed] --dense FINETUNE
    python benchmarks/decode.py --shape llama3-8b --blocks 4 --work FOLDER [--contenders loop,dense]

Each contender is a process that waits for its turn; a turn is a prompt of random tokens and then `--tokens` greedy ones, of which
the decode part counts. Noise of the machine meets all of them; minima of seconds are compared, medians printed beside. llama.cpp
is llama-cpp-python in an environment of its own, driven through its C interface without sampling objects; its GGUF should have the
artifact's widths (Q4_0, output and embedding Q8_0 beside `--lm-head-bits 8`). Of a bundle, --mixed keeps base, shared vector and
bits as they are, and without it the task's weights are dense. With --shape a checkpoint of random weights is made, quantized and
removed (`shapes.py`). A row goes to results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jsonl
import shapes

RESULTS = Path(__file__).resolve().parent / "results" / "decode.jsonl"

LLAMA = """
import ctypes, json, sys, time
import llama_cpp as C
import numpy as np
path, threads, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:5])
C.llama_backend_init()
quiet = C.llama_log_callback(lambda level, text, data: None)
C.llama_log_set(quiet, ctypes.c_void_p(0))
model = C.llama_load_model_from_file(path.encode(), C.llama_model_default_params())
options = C.llama_context_default_params()
options.n_ctx, options.n_batch, options.n_threads, options.n_threads_batch = prompt + tokens + 8, prompt + 8, threads, threads
context = C.llama_new_context_with_model(model, options)
size = C.llama_n_vocab(C.llama_model_get_vocab(model))
ids = np.random.default_rng(0).integers(3, size, prompt).astype(np.int32)

def feed(values):
    array = (C.llama_token * len(values))(*map(int, values))
    assert C.llama_decode(context, C.llama_batch_get_one(array, len(values))) == 0
    return int(np.ctypeslib.as_array(C.llama_get_logits_ith(context, -1), shape=(size,)).argmax())

def turn():
    C.llama_memory_clear(C.llama_get_memory(context), True)
    start = time.perf_counter()
    token = feed(ids)
    middle = time.perf_counter()
    for _ in range(tokens - 1):
        token = feed([token])
    return middle - start, time.perf_counter() - middle

print(json.dumps({"version": C.__version__, "system": C.llama_print_system_info().decode()}), flush=True)
for line in sys.stdin:
    print(json.dumps(turn()), flush=True)
"""


def worker(kind: str, folder: str, threads: int, prompt: int, tokens: int, of: dict[str, Any]) -> None:
    """`generate` or our own `loop`; a turn for every line of stdin. `of` says which task of a bundle."""
    import torch
    import transformers

    import compress

    torch.set_num_threads(threads)
    mixed = of.pop("mixed", False)
    model: Any = compress.load(folder, dtype="bfloat16", **({"base": of["base"]} if mixed else of))
    if mixed:
        model.set_task(of["task"])
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    turn = {"generate": _generate, "loop": _loop}[kind]
    route = getattr(model, "decoding", None)
    about = {
        "version": transformers.__version__,
        "torch": torch.__version__,
        "path": "transformers" if route is None else route.path,
    }
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        with torch.inference_mode():
            print(json.dumps(turn(model, ids, tokens)), flush=True)


def _generate(model: Any, ids: Any, tokens: int) -> tuple[float, float]:
    from compress.timing import stamps

    times = stamps(model, ids, tokens)
    return times[2] - times[0], times[-1] - times[2]  # times[1] is the prompt's


def _loop(model: Any, ids: Any, tokens: int) -> tuple[float, float]:
    from compress.decoding import loop

    times = [time.perf_counter()]
    for _ in loop.tokens(model, ids, tokens, ends=False):
        times.append(time.perf_counter())
    return times[1] - times[0], times[-1] - times[1]


class Contender:
    """A process that takes turns."""

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        self.name = name
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.about = self._answer()
        self.first: list[float] = []
        self.rest: list[float] = []

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: its own message is above")
        return json.loads(line)

    def turn(self) -> None:
        """One more measurement."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        first, rest = self._answer()
        self.first.append(first)
        self.rest.append(rest)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("--dense", help="the dense model")
    parser.add_argument("--contenders", default="loop,generate,dense", help="which of ours run")
    parser.add_argument("--base", help="of a bundle")
    parser.add_argument("--task", help="of a bundle")
    parser.add_argument("--mixed", action="store_true", help="the bundle as a model of all tasks, set to the one")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--gguf", help="the model for it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--label", default="", help="names the row")
    shapes.options(parser)
    args = parser.parse_args()
    args.ours = args.contenders.split(",")
    if bool(args.artifact) == bool(args.shape) or not {*args.ours} <= {"loop", "generate", "dense"}:
        parser.error("name an artifact, or --shape; --contenders are loop, generate and dense")
    if not args.shape:
        if "dense" in args.ours and not args.dense:
            parser.error("--dense, or other --contenders")
        run(args)
        return
    with shapes.made(args, dense="dense" in args.ours) as made:
        args.artifact, args.dense, args.label = str(made.artifact), str(made.dense), args.label or made.label
        run(args)


def run(args: argparse.Namespace) -> None:
    """Let the contenders take turns."""
    of = {"base": args.base, "task": args.task, "mixed": args.mixed} if args.task else {}
    sizes = [str(args.threads), str(args.prompt), str(args.tokens)]
    ours = [sys.executable, __file__, "--worker"]
    commands = {
        "loop": [*ours, "loop", args.artifact, *sizes, json.dumps(of)],
        "generate": [*ours, "generate", args.artifact, *sizes, json.dumps(of)],
        "dense": [*ours, "generate", args.dense, *sizes, "{}"],
    }
    commands = {name: commands[name] for name in args.ours}
    if args.llama_python:
        commands["llama.cpp"] = [args.llama_python, "-c", LLAMA, args.gguf, *sizes]
    contenders = [Contender(name, command, args.threads) for name, command in commands.items()]
    for round_ in range(args.rounds + 1):
        for contender in contenders:
            contender.turn()
            if round_ == 0:
                contender.first, contender.rest = [], []
    for contender in contenders:
        contender.close()
    report(args, contenders)


def report(args: argparse.Namespace, contenders: list[Contender]) -> None:
    """Print speeds and ratios, and append the row."""
    speed: Callable[[float], float] = lambda seconds: round((args.tokens - 1) / seconds, 2)  # noqa: E731
    best = {c.name: speed(min(c.rest)) for c in contenders}
    usual = {c.name: speed(median(c.rest)) for c in contenders}
    print(f"{'':10s} {'best tok/s':>10s} {'median':>8s} {'first s':>8s}")
    for c in contenders:
        print(f"{c.name:10s} {best[c.name]:10.1f} {usual[c.name]:8.1f} {min(c.first):8.3f}  {c.about.get('path', '')}")
    pairs = [(a, b) for a in ("loop", "generate") for b in ("dense", "llama.cpp") if a in best and b in best]
    ratios = {f"{a}/{b}": round(best[a] / best[b], 3) for a, b in pairs}
    print("  ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    jsonl.append(
        RESULTS,
        {
            "label": args.label, "threads": args.threads, "prompt": args.prompt, "tokens": args.tokens, "rounds": args.rounds,
            "best": best, "median": usual, "first_s": {c.name: round(min(c.first), 4) for c in contenders}, "ratios": ratios,
            "path": contenders[0].about["path"], "versions": {c.name: c.about["version"] for c in contenders},
            "torch": contenders[0].about["torch"], "load": round(os.getloadavg()[0], 1),
        },
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        numbers = map(int, sys.argv[4:7])
        worker(sys.argv[2], sys.argv[3], *numbers, json.loads(sys.argv[7]))
    else:
        main()

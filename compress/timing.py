"""How fast the kernels and a model are on this machine, beside the dense product and the dense model in the same run.

Weights are cold: a product goes over copies that together exceed the caches several times. Products of all kinds are timed in
turns, so that what else runs on the machine meets all of them; medians are compared, and every ratio is to the dense bf16 product
of the same shape and rows. Random numbers, never zeros.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from compress.errors import CompressError, nearest
from compress.modules import CompressedLinear, CompressedWeight
from compress.subjects import SUBJECTS, TOGETHER, Subject

COLD = 192 << 20  # bytes that the copies of one weight take together
SHAPES = {"4096x4096": (4096, 4096), "14336x4096": (14336, 4096), "4096x14336": (4096, 14336), "576x576": (576, 576)}
_LEAST, _MOST, _SECONDS = 5, 200, 2.0  # products per kind and shape, and about how long they take together


@dataclass(frozen=True, slots=True)
class Row:
    """One kind, shape and number of rows of x."""

    kind: str
    path: str
    shape: tuple[int, int]
    rows: int
    ms: float  # median
    dense_ms: float  # the dense bf16 product's, in the same turns
    least_ms: float  # of all turns
    dense_least_ms: float
    gb_s: float  # of the artifact's bytes
    share: float  # of the bandwidth that this machine reads at, measured before

    @property
    def speedup(self) -> float:
        """Over the dense product."""
        return self.dense_ms / self.ms

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "speedup": self.speedup, "least_speedup": self.dense_least_ms / self.least_ms}


def bandwidth() -> float:
    """GB/s that reading takes place at: the best of a few sums over 256 MB, with torch's threads."""
    x = torch.ones(64 << 20)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        x.sum()
        best = max(best, x.numel() * 4 / (time.perf_counter() - start) / 1e9)
    return best


def kernels(
    kinds: Sequence[str] = (), shapes: Sequence[str] = (), rows: Sequence[int] = (1, 4, 16, 64, 256), seconds: float = _SECONDS
) -> Iterator[Row]:
    """Time every kind on every shape and number of rows; yields a row as soon as it is measured."""
    for given, known, what in ((kinds, list(SUBJECTS), "kind"), (shapes, list(SHAPES), "shape")):
        for name in given:
            if name not in known and not (what == "shape" and parsed_shape(name)):
                hint = f"there are {', '.join(known)}; {nearest(name, known)}"
                raise CompressError(f"{name!r} is no {what}", hint=hint, usage=True)
    read = bandwidth()
    for label in shapes or SHAPES:
        O, I = SHAPES.get(label) or parsed_shape(label) or (0, 0)
        if I % 64:
            raise CompressError(f"{label}: {I} inputs cannot be split into groups of 64", hint="use another shape", usage=True)
        yield from _shape_rows(kinds or list(SUBJECTS), O, I, rows, read, seconds)


def parsed_shape(text: str) -> tuple[int, int] | None:
    """(O, I) of a text OUTxIN; None where it is no such text."""
    parts = text.split("x")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(p.isdigit() and int(p) for p in parts) else None


@torch.inference_mode()
def _shape_rows(kinds: Sequence[str], O: int, I: int, rows: Sequence[int], read: float, seconds: float) -> Iterator[Row]:
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(O, I, generator=g).bfloat16() for _ in range(_copies(2 * O * I))]
    for family in _families(kinds):
        subjects = []
        for kind in family:
            first = SUBJECTS[kind](O, I, g)
            subjects.append([first] + [SUBJECTS[kind](O, I, g) for _ in range(_copies(first.size) - 1)])
        for M in rows:
            x = torch.randn(M, I, generator=g).bfloat16()
            runs = [partial(_ours, copies, x) for copies in subjects] + [partial(_dense, dense, x)]
            *ours, theirs = _turns(runs, seconds)
            for kind, copies, (middle, least) in zip(family, subjects, ours, strict=True):
                gb_s = copies[0].size / middle / 1e9
                yield Row(
                    kind, copies[0].path, (O, I), M, middle * 1e3, theirs[0] * 1e3, least * 1e3, theirs[1] * 1e3, gb_s, gb_s / read
                )  # fmt: skip
        del subjects, copies, first
        gc.collect()  # modules refer to themselves


def _families(kinds: Sequence[str]) -> list[list[str]]:
    """The kinds, those that are timed together side by side, in the order in which they were named."""
    found: list[list[str]] = []
    for kind in kinds:
        family = next((f for f in TOGETHER if kind in f), (kind,))
        here = next((f for f in found if f[0] in family), None)
        if here is None:
            found.append([kind])
        else:
            here.append(kind)
    return found


def _ours(copies: Sequence[Subject], x: torch.Tensor, turn: int) -> torch.Tensor:
    return copies[turn % len(copies)].run(x)


def _dense(copies: Sequence[torch.Tensor], x: torch.Tensor, turn: int) -> torch.Tensor:
    return torch.nn.functional.linear(x, copies[turn % len(copies)])


def _copies(size: int) -> int:
    return max(2, min(64, -(-COLD // size)))


def _turns(runs: Sequence[Callable[[int], object]], seconds: float) -> list[tuple[float, float]]:
    """Median and least seconds of each, in turns whose order changes: what follows the dense product is slower."""
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    pairs, draw, turn = list(zip(runs, times, strict=True)), random.Random(0), 0
    while turn < _LEAST or (turn < _MOST and time.perf_counter() < end):
        for run, seen in draw.sample(pairs, len(pairs)):
            start = time.perf_counter()
            run(turn)
            seen.append(time.perf_counter() - start)
        turn += 1
    return [(median(seen[1:]), min(seen[1:])) for seen in times]


# -- whole models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Speed:
    """A model's speed at one batch size."""

    model: str
    batch: int
    prefill: float  # tokens/s of a prompt
    first: float  # seconds to the first token
    decode: float  # tokens/s of all rows together, after the first
    weights: int  # bytes that its parameters and buffers take, prepared ones included
    peak: int  # bytes resident at most
    path: str  # "native", or "transformers" and why


def model(
    folder: str | Path,
    *,
    batches: Sequence[int] = (1,),
    prompt: int = 128,
    tokens: int = 32,
    repeats: int = 3,
    dtype: str = "bfloat16",
) -> Iterator[Speed]:  # fmt: skip
    """Time a model, compressed or dense, with random prompts of `prompt` tokens and `tokens` new ones, greedily."""
    from compress.loading import load

    if min(prompt, tokens - 1, repeats, *batches) < 1:
        raise CompressError("--prompt, --repeats and batch sizes are at least 1, --tokens 2", hint="leave them out", usage=True)
    network = load(folder, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    for batch in batches:
        yield _speed(network, str(folder), _prompts(network, batch, prompt, tokens, g), tokens, repeats)


def _prompts(network: Any, batch: int, prompt: int, tokens: int, g: torch.Generator) -> torch.Tensor:
    """Random tokens (batch, prompt)."""
    room = getattr(network.config, "max_position_embeddings", None)
    if room is not None and prompt + tokens > room:
        hint = f"--prompt {max(1, room - tokens)}"
        raise CompressError(f"{prompt} + {tokens} tokens exceed the model's context of {room}", hint=hint, usage=True)
    return torch.randint(0, network.config.vocab_size, (batch, prompt), generator=g).to(network.device)


@torch.inference_mode()
def _speed(network: Any, label: str, ids: torch.Tensor, tokens: int, repeats: int) -> Speed:
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    times: dict[int, list[float]] = {1: [], tokens: []}
    network.generate(ids, max_new_tokens=2, min_new_tokens=2, **options)
    for _ in range(repeats):
        for count, seen in times.items():
            start = time.perf_counter()
            network.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            seen.append(time.perf_counter() - start)
    first, whole = median(times[1]), median(times[tokens])
    batch, prompt = ids.shape
    decode = batch * (tokens - 1) / max(whole - first, 1e-9)
    return Speed(label, batch, batch * prompt / first, first, decode, _held(network), _peak(), _path(network))


def _path(network: Any) -> str:
    decoding = getattr(network, "decoding", None)
    return "transformers" if decoding is None else str(decoding.path)


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of one token goes, after the prompt, one row."""

    model: str
    path: str  # "native" or "transformers", by `generate`; or "native, own loop", which is `compress generate`'s
    token: float  # ms, median
    kernels: float  # ms of it in the native call, or in the linears


def profile(folder: str | Path, *, prompt: int = 128, tokens: int = 32, dtype: str = "bfloat16") -> Iterator[Profile]:
    """One row per path that the model can decode by: how much of a token's time is in kernels. What is left is Python, small
    operators (norms, rotation, attention: in the native path they belong to the kernel) and transformers' loop.
    """
    from compress.decoding import loop
    from compress.loading import load

    network: Any = load(folder, dtype=dtype)
    ids = _prompts(network, 1, prompt, tokens, torch.Generator().manual_seed(0))
    decoding = getattr(network, "decoding", None)
    plan = "" if decoding is None else decoding.plan()
    if decoding is not None and not isinstance(plan, str):
        seen: list[float] = []
        with _timed(plan.decoder, "step", seen):
            ms = _per_token(network, ids, tokens)
        yield Profile(str(folder), "native", ms, median(seen) * 1e3)
        if loop.usable(network) is None:
            seen = []
            with _timed(plan.decoder, "step", seen):
                times = [time.perf_counter() for _ in loop.tokens(network, ids, tokens, ends=False)]
            yield Profile(str(folder), "native, own loop", median(b - a for a, b in pairwise(times)) * 1e3, median(seen) * 1e3)
        decoding.enabled = False
    inside: list[float] = []
    linears = [m for m in network.modules() if isinstance(m, CompressedLinear | torch.nn.Linear)]
    with ExitStack() as stack:
        for module in linears:
            stack.enter_context(_timed(module, "forward", inside))
        ms = _per_token(network, ids, tokens)
    passes = [sum(inside[i : i + len(linears)]) for i in range(0, len(inside), len(linears))]
    yield Profile(str(folder), "transformers", ms, median(passes) * 1e3)


@contextmanager
def _timed(owner: Any, name: str, seen: list[float]) -> Iterator[None]:
    """Note the seconds of every call of a method."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        seen.append(time.perf_counter() - start)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


@torch.inference_mode()
def stamps(network: Any, ids: torch.Tensor, tokens: int) -> list[float]:
    """Seconds at which greedy `generate` begins, hands out the prompt ids (1, T), and hands out each new token."""
    times = [time.perf_counter()]

    class Clock:
        def put(self, value: object) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "streamer": Clock()}
    network.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return times


def _per_token(network: Any, ids: torch.Tensor, tokens: int) -> float:
    """Median ms between the tokens that `generate` hands out, the first after the prompt left out."""
    return median(b - a for a, b in pairwise(stamps(network, ids, tokens)[3:])) * 1e3


def _held(network: torch.nn.Module) -> int:
    """Bytes of every tensor that the model holds, each storage once."""
    seen: dict[int, int] = {}

    def note(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (tuple, list)):
            for item in value:
                note(item)
        elif hasattr(value, "__dataclass_fields__"):
            for name in value.__dataclass_fields__:
                note(getattr(value, name))

    for module in network.modules():
        buffers = module.held() if isinstance(module, CompressedWeight) else module.buffers(recurse=False)
        for tensor in (*module.parameters(recurse=False), *buffers):
            note(tensor)
        note(getattr(module, "prepared", None))
    return sum(seen.values())


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The few shapes of data that travel between the rooms. No torch at import time."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Scaling:
    """One place where a per-channel scale can move from a producer's output into its consumers' input columns.

    AWQ's mapping (arXiv 2306.00978, section 3.2; llm-awq `auto_scale.py`). Names are relative to the block.
    """

    producer: str  # a norm (its weight is divided) or a linear (its output rows are divided)
    consumers: tuple[str, ...]  # linears whose columns are multiplied: every reader of the producer's output
    inspect: str  # module whose output error is the loss; equal to consumers[0] for a single linear
    norm: bool = False  # the producer is a norm
    norm_offset: float = 0.0  # 1.0 for (1 + w) norms (Gemma)
    rows: tuple[int, int] | None = None  # rows of a fused linear producer that carry the scale; None: all
    heads: tuple[int, int, int] | None = None  # (n_kv, n_rep, head_dim): tie the scale over the repeats (GQA)


Wrappers = tuple["torch.Tensor", "torch.Tensor"]  # ARMOR's pre (ceil(I/b), b, b) and post (ceil(O/b), b, b)


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What a checkpoint records about a linear whose zeros are meant."""

    pattern: tuple[int, int] | None = None  # N kept of every M inputs
    mask_sha256: str | None = None
    wrapped: tuple[int, int] | None = None  # (b_in, b_out) of ARMOR's wrappers, between which the weight stands


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer block as it lies in the checkpoint.

    `weights` holds the linears to compress, `(O, I)`, in the checkpoint's dtype; `tensors` everything else of the block
    (norms, biases, linears that the user told to ignore). All names are relative to the block; weights are keyed by
    module name (`self_attn.q_proj`), tensors by parameter name (`input_layernorm.weight`).
    """

    index: int
    weights: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]
    groups: tuple[tuple[str, ...], ...]  # linears that read the same input
    producers: tuple[Scaling, ...] = ()
    no_clip: frozenset[str] = frozenset()  # linears whose outputs are multiplied together (q, k): clipping them is unsafe
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of each linear's format, where the layout decided them
    gradient: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what the method's reducer kept of the reverse walk
    survey: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what the method kept of its own walk before this one
    sparse: frozenset[str] = frozenset()  # linears whose zeros must stay zeros
    wrappers: Mapping[str, Wrappers] = field(default_factory=dict)  # linears whose weight is a core: post W pre


@dataclass(frozen=True, slots=True)
class Rotate:
    """A method's wish that the checkpoint be read through `models.rotate`."""

    seed: int


class Stat(enum.Flag):
    """Statistics of a linear's input that a method may ask for (`compress.stats` computes them)."""

    NONE = 0
    ABSMEAN = enum.auto()  # mean |x| per channel, [I]
    GROUP_GRAM = enum.auto()  # sum of x xᵀ inside each group of `group` channels, [I/g, g, g]
    ENERGY = enum.auto()  # mean x² per channel, [I]
    GRAM = enum.auto()  # the whole second moment, [I, I] (kept as samples while there are fewer tokens than channels)


@dataclass(frozen=True, slots=True)
class Collect:
    """What a method needs from the forward walk: statistics per linear, and modules that it will run again."""

    stats: Mapping[str, Stat] = field(default_factory=dict)  # keyed by the first linear of a group
    modules: tuple[str, ...] = ()
    group: int = 0  # channels per group for GROUP_GRAM


@dataclass(frozen=True, slots=True)
class Packed:
    """One linear in an artifact: the tensors that are written, and what they mean."""

    kind: str
    version: int
    params: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]  # suffix -> tensor, written as `<linear>.<suffix>`
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Trainable:
    """A packed linear opened for training: its float parts, the weight (O, I) that they make, and the way back."""

    parts: Mapping[str, torch.Tensor]  # fp32
    weight: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]  # differentiable
    rebuild: Callable[[Mapping[str, torch.Tensor]], Packed]
    steps: Mapping[str, float] = field(default_factory=dict)  # of parts, relative to the usual step; 0: stays as it is


@dataclass(frozen=True, slots=True)
class Result:
    """What a method returns for one block."""

    packed: Mapping[str, Packed]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)  # changed dense tensors, the block's own dtype
    errors: Mapping[str, float] = field(default_factory=dict)  # |W_hat - W| / |W| of what was unpacked again
    record: Mapping[str, Any] = field(default_factory=dict)  # JSON: what the search chose; goes into the manifest

    def merge(self, other: Result) -> Result:
        """Both results in one; lists of the records are joined."""
        record = dict(self.record)
        for key, value in other.record.items():
            record[key] = [*record[key], *value] if isinstance(record.get(key), list) else value
        return Result(
            {**self.packed, **other.packed}, {**self.tensors, **other.tensors}, {**self.errors, **other.errors}, record
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Progress:
    """What one finished block looks like to whoever watches."""

    block: int
    blocks: int
    seconds: float
    left: float  # seconds, from the blocks done in this run
    rss: int  # bytes
    error: float | None = None  # mean relative weight error of the block's linears; None in walks that compress nothing
    bits: float | None = None  # stored bits per weight
    what: str = "gradients"  # of a walk that compresses nothing


class Reducer(Protocol):
    """Makes of one block's gradients what shall be kept of them, so that they never lie side by side."""

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        """One linear in one sample: inputs x (T, I) and dL/dy (T, O); the weight's gradient is dyᵀ x."""
        ...

    def result(self) -> dict[str, torch.Tensor]:
        """Asked once, after the last sample; the keys are the method's own."""
        ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a method trains the model while it looks: `epochs` over the windows, `batch` of them to a step."""

    epochs: int
    batch: int
    lr: float  # the highest rate
    warmup: float  # share of the steps in which the rate rises; then it falls to 0
    clip: float  # longest gradient of the whole model; 0: any length

    def rate(self, step: int, steps: int) -> float:
        """The rate of step 1..steps (LOMO's linear schedule)."""
        progress = step / max(2, steps)
        return self.lr * (progress / self.warmup if progress < self.warmup else max(0.0, (1 - progress) / (1 - self.warmup)))


class Learner(Protocol):
    """What a method makes of a block's gradients while it trains: one object per block and step, its sums on disk between them."""

    def learn(self, name: str, g: torch.Tensor, lr: float) -> torch.Tensor:
        """A linear's gradient g (O, I) in one step at rate `lr`; returns the gradient to descend along (may be g, changed)."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """What the next step's object starts from."""
        ...

    def result(self) -> dict[str, torch.Tensor]:
        """As `Reducer.result`, after the last step."""
        ...


class Runner(Protocol):
    """Runs a module of the block over the calibration inputs that the pipeline kept."""

    batches: int

    def __call__(self, module: str, overrides: Mapping[str, torch.Tensor], batches: range) -> Iterator[torch.Tensor]:
        """Yield the module's output for each batch with `<linear>.weight` replaced by `overrides[linear]` (O, I)."""
        ...


class TokenView(Protocol):
    """One batch of calibration tokens at one block, for methods with `token_weights`. Everything is made on demand."""

    def hidden(self) -> torch.Tensor:
        """The block's input (B, T, D)."""
        ...

    def output(self) -> torch.Tensor:
        """The dense block's output (B, T, D)."""
        ...

    def attention(self) -> torch.Tensor:
        """Attention that each token receives, summed over heads and queries (B, T), fp32."""
        ...

    def counts(self) -> torch.Tensor:
        """How often each token occurs in the calibration text (B, T)."""
        ...


TensorSpec = tuple[str, tuple[int, ...]]  # safetensors dtype name ("I32", "F16", …) and shape

"""AWQ: activation-aware weight quantization (arXiv 2306.00978, MLSys 2024; code mit-han-lab/llm-awq).

    s* = argmin over s = s_X^r, r in {0, 1/20, …, 1}:   | f(x; Q(W diag(s)) diag(s)^-1) - f(x; W) |^2

s_X is the mean |x| per input channel, f the module that holds the linears (attention for q/k/v, MLP for gate/up, the linear
itself for o and down); diag(s)^-1 is folded into the preceding operator. Then each (row, group) is clipped to the m that
minimises the error of its partial products, and everything is rounded. Order in a block: all searches from the unscaled block ->
apply all scales -> clip -> round; every block sees the dense model's activations (`propagate` feeds it the compressed ones').

Where we differ from llm-awq, checked against it in docs/parity.md:
- identity (r = 0) and r = 1 are always candidates, so a mapping's loss on the calibration data is never above RTN's;
- the range includes 0 (`extend_zero=False` restores theirs), and scales are rounded to their storage dtype before the codes;
- under GQA the v -> o scale is tied over the repeated heads instead of skipped;
- s is snapped so that the norm's new weight is exact in its storage dtype: folding changes no function;
- for a single linear the loss is computed from the second moment of its input: the same number, without the samples;
- clip errors use every calibration token (second moments per group) instead of 512;
- `search="fast"` (default) ranks all candidates on an eighth of the batches and decides among the best `keep` and the identity
  on all of them; `search="full"` evaluates every candidate on everything.
`duo` is AutoAWQ's s_X^r / w_mean^(1-r). `joint` decides among the best `keep` with their clips applied, as they will be used, and
leaves a mapping alone (identity, no clip) if that is best. `quality` is `QUALITY` below, chosen by measurement (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError
from compress.methods._pack import quantize
from compress.methods._quantizer import Grid, check_grid, check_groups, fit, fit_range, pick_least, ranges, round_to
from compress.stats import InputStats
from compress.types import Block, Collect, Packed, Result, Runner, Scaling, Stat

CALIBRATED = True
DUO = ("off", "on", "both")
QUALITY = ("joint", "propagate")
_SMALLEST = 1e-4  # llm-awq's clamp of s
_CHUNK = 1 << 22  # weights per chunk of the clip search


@dataclass(frozen=True, slots=True)
class Config:
    """Options of AWQ; the defaults are the paper's."""

    bits: int = field(default=4, metadata={"help": "bits per weight: 2, 3, 4 or 8"})
    group_size: int = field(default=128, metadata={"help": "inputs that share a scale; -1: a whole row"})
    symmetric: bool = field(default=False, metadata={"help": "no zero-points"})
    sym_scale: str = field(default="full", metadata={"help": "symmetric scale: full = 2 max/(2^b-1), restricted = max/(2^(b-1)-1)"})
    grid: int = field(default=20, metadata={"help": "steps of the exponent r in 0..1"})
    duo: str = field(default="off", metadata={"help": "also divide by the weights' magnitude: off, on, both"})
    clip: bool = field(default=True, metadata={"help": "search a clip per row and group"})
    clip_steps: int = field(default=10, metadata={"help": "clip candidates, 1.00 down in steps of 0.05"})
    search: str = field(default="fast", metadata={"help": "fast: rank on an eighth of the data, decide on all; full: all on all"})
    keep: int = field(default=4, metadata={"help": "candidates that the fast search decides among"})
    joint: bool = field(default=False, metadata={"help": "decide among those candidates with their clips applied"})
    propagate: bool = field(default=False, metadata={"help": "calibrate each block on the compressed blocks before it"})
    extend_zero: bool = field(default=True, metadata={"help": "the range of a group includes 0; off: as llm-awq"})
    quality: bool = field(default=False, metadata={"help": "joint and propagate; about 2x the time; not better everywhere"})

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, self.sym_scale)
        for name, known in (("duo", DUO), ("search", ("fast", "full"))):
            if getattr(self, name) not in known:
                raise CompressError(
                    f"--{name} {getattr(self, name)!r} is unknown", hint=f"use one of {', '.join(known)}", usage=True
                )
        for name, least, most in (("grid", 1, 1000), ("clip_steps", 1, 20), ("keep", 1, 1000)):
            if not least <= getattr(self, name) <= most:
                option = name.replace("_", "-")
                raise CompressError(f"--{option} must be in {least}..{most}", hint="leave it out for the default", usage=True)
        if self.quality:
            for name in QUALITY:
                object.__setattr__(self, name, True)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a linear (O, I) that this configuration cannot hold."""
        check_groups(name, shape[1], self.group_size)

    def params(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Format parameters of a linear (O, I)."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}


def active(block: Block) -> list[Scaling]:
    """The block's mappings that scale at least one linear to be compressed."""
    return [m for m in block.producers if any(c in block.weights for c in m.consumers)]


def collects(block: Block, config: Config) -> Collect:
    """Mean |x| of every scaled input, second moments for clipping and single linears, inputs of the other modules."""
    stats: dict[str, Stat] = {}
    modules: list[str] = []
    single = {m.inspect for m in active(block) if m.inspect in m.consumers}
    for group in block.groups:
        clipped = config.clip and any(n in block.weights and n not in block.no_clip for n in group)
        want = Stat.GROUP_GRAM if clipped else Stat.NONE
        if any(set(group) & set(m.consumers) for m in active(block)):
            want |= Stat.ABSMEAN
        if single & set(group) or (clipped and config.group_size == -1):
            want |= Stat.GRAM
        if want:
            stats[group[0]] = want
    for m in active(block):
        if m.inspect not in m.consumers:
            modules.append(m.inspect)
    return Collect(stats, tuple(modules), config.group_size)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One scale to try: exponent, whether duo, and s (I,), as the consumers' columns are multiplied."""

    ratio: float
    duo: bool
    s: torch.Tensor


def _weight(block: Block, name: str) -> torch.Tensor:
    """A linear's weight (O, I) in fp32, compressed or ignored."""
    source = block.weights[name] if name in block.weights else block.tensors[f"{name}.weight"]
    return source.float()


def _tie(x: torch.Tensor, mapping: Scaling) -> torch.Tensor:
    """Average a statistic (I,) over the query heads that share a value head."""
    if mapping.heads is None:
        return x
    n_kv, n_rep, d = mapping.heads
    return x.view(n_kv, n_rep, d).mean(1, keepdim=True).expand(n_kv, n_rep, d).reshape(-1)


def _untie(s: torch.Tensor, mapping: Scaling) -> torch.Tensor:
    """The producer's side of a tied scale: (I,) -> one value per producer row."""
    if mapping.heads is None:
        return s
    n_kv, n_rep, d = mapping.heads
    return s.view(n_kv, n_rep, d)[:, 0].reshape(-1)


def _fold_norm(block: Block, mapping: Scaling, s: torch.Tensor) -> torch.Tensor:
    """The norm's new weight (I,) in its storage dtype."""
    weight = block.tensors[f"{mapping.producer}.weight"]
    return ((weight.float() + mapping.norm_offset) / s - mapping.norm_offset).to(weight.dtype)


def _snap(block: Block, mapping: Scaling, s: torch.Tensor) -> torch.Tensor:
    """The s nearest to the given one for which the folded norm weight is exact in its storage dtype."""
    if not mapping.norm:
        return s
    old = block.tensors[f"{mapping.producer}.weight"].float() + mapping.norm_offset
    new = _fold_norm(block, mapping, s).float() + mapping.norm_offset
    exact = old / new
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, s)


def _balance(s: torch.Tensor) -> torch.Tensor:
    """Clamp, centre in the log domain, and make harmless whatever is not finite."""
    s = s.clamp(min=_SMALLEST)
    s = s / (s.max() * s.min()).sqrt()
    return torch.where(torch.isfinite(s) & (s > 0), s, torch.ones_like(s))


def candidates(block: Block, mapping: Scaling, s_X: torch.Tensor, config: Config) -> list[Candidate]:
    """The identity first, then r = 1/grid … 1, without and with duo scaling as configured."""
    s_X = _tie(s_X, mapping)
    out = [Candidate(0.0, False, torch.ones_like(s_X))]
    ratios = [i / config.grid for i in range(config.grid + 1)]
    if config.duo != "on":
        out += [Candidate(r, False, _snap(block, mapping, _balance(s_X**r))) for r in ratios[1:]]
    if config.duo != "off":
        W = torch.cat([_weight(block, c) for c in mapping.consumers])
        g = W.shape[1] if config.group_size == -1 else config.group_size
        v = W.view(W.shape[0], -1, g).abs()
        w_mean = _tie((v / (v.amax(-1, keepdim=True) + 1e-6)).view(W.shape).mean(0), mapping)
        for r in ratios:
            out.append(Candidate(r, True, _snap(block, mapping, _balance(s_X**r / (w_mean ** (1 - r) + 1e-4)))))
    return out


def losses(
    block: Block, mapping: Scaling, tried: list[Candidate], stats: Mapping[str, InputStats], run: Runner | None, batches: range,
    grid: Grid, clip_steps: int = 0,
) -> list[float]:  # fmt: skip
    """Mean squared output error of each candidate over the given batches; with `clip_steps` as clipped, else unclipped."""
    out = []
    for candidate in tried:
        W_hat = {}
        for c in mapping.consumers:
            if c in block.weights:
                W = _weight(block, c) * candidate.s
                clipped, own = clip_steps and c not in block.no_clip, grid.at(block.params.get(c))
                fitted = clip(W, _gram(stats[c], candidate.s), own, clip_steps) if clipped else fit(W, own)
                W_hat[c] = round_to(W.view(*fitted[0].shape, -1), *fitted, own).view(W.shape).div_(candidate.s)
        if mapping.inspect in W_hat:
            W = _weight(block, mapping.inspect)
            out.append(stats[mapping.inspect].quadratic(W_hat[mapping.inspect] - W) / W.shape[0])
            continue
        assert run is not None
        total, count = 0.0, 0
        dense = run(mapping.inspect, {}, batches)
        for y, y_hat in zip(dense, run(mapping.inspect, W_hat, batches), strict=True):
            total += float((y_hat.float() - y.float()).square_().sum(dtype=torch.float64))
            count += y.numel()
        out.append(total / count)
    return out


def _gram(stats: InputStats, s: torch.Tensor | None) -> torch.Tensor:
    """Second moments (G, g, g) of an input whose channels were divided by s (I,)."""
    gram = stats.group_gram()
    if s is not None:
        inverse = s.reciprocal().view(gram.shape[0], -1)
        gram.mul_(inverse.unsqueeze(1)).mul_(inverse.unsqueeze(2))
    return gram


def search(
    block: Block, mapping: Scaling, stats: Mapping[str, InputStats], config: Config, run: Runner | None, grid: Grid
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The best s (I,) of one mapping, and what was found: never worse than the identity on the calibration data."""
    tried = candidates(block, mapping, stats[mapping.consumers[0]].absmean(), config)
    every = range(run.batches) if run is not None else range(0)
    part = range(0, len(every), 8)
    single, joint = mapping.inspect in mapping.consumers, config.joint and config.clip
    fast = not single and config.search == "fast" and len(part) * 2 <= len(every)
    if fast or joint:
        rough = losses(block, mapping, tried, stats, run, part if fast else every, grid)
        order = sorted(range(1, len(tried)), key=lambda i: rough[i] if math.isfinite(rough[i]) else math.inf)
        tried = [tried[0], *(tried[i] for i in sorted(order[: config.keep]))]
    found = losses(block, mapping, tried[:1] if joint else tried, stats, run, every, grid)
    plain = found[0]
    if not math.isfinite(plain):
        raise CompressError(
            f"block {block.index}, {mapping.inspect}: its output overflows on the calibration data",
            hint="is the calibration text normal text? a float16 model may need a bfloat16 or float32 copy",
        )
    if joint:
        found += losses(block, mapping, tried, stats, run, every, grid, config.clip_steps)
        tried = [tried[0], *tried]
    best = min(range(len(tried)), key=lambda i: found[i] if math.isfinite(found[i]) else math.inf)
    record = {
        "producer": mapping.producer, "consumers": list(mapping.consumers), "ratio": tried[best].ratio, "duo": tried[best].duo,
        "loss": float(f"{found[best]:.9g}"), "rtn_loss": float(f"{plain:.9g}"),
    }  # fmt: skip
    if joint:
        record["clip"] = best > 0
    return tried[best].s, record


class Fold:
    """Scales of one block, folded on demand: one linear at a time, so that no second copy of the block is held."""

    def __init__(self, block: Block, scales: list[tuple[Scaling, torch.Tensor]]) -> None:
        self._block = block
        self._scales = scales
        self.columns = {c: s for m, s in scales for c in m.consumers}

    def weight(self, name: str) -> torch.Tensor:
        """A linear's weight (O, I) in fp32 with its columns multiplied and, if it is a producer, its rows divided."""
        W = _weight(self._block, name)
        if name in self.columns:
            W = W * self.columns[name]
        for m, s in self._scales:
            if not m.norm and m.producer == name:
                W = W.clone()
                W[slice(*m.rows) if m.rows else slice(None)] /= _untie(s, m).unsqueeze(1)
        return W

    def tensors(self) -> dict[str, torch.Tensor]:
        """The dense tensors that change: norms, biases of producers, and linears that are not compressed."""
        out: dict[str, torch.Tensor] = {}
        for m, s in self._scales:
            if m.norm:
                out[f"{m.producer}.weight"] = _fold_norm(self._block, m, s)
            bias = self._block.tensors.get(f"{m.producer}.bias")
            if bias is not None:
                b = bias.float().clone()
                b[slice(*m.rows) if m.rows else slice(None)] /= _untie(s, m)
                out[f"{m.producer}.bias"] = b.to(bias.dtype)
            for name in (*m.consumers, *(() if m.norm else (m.producer,))):
                if name not in self._block.weights:
                    dense = self._block.tensors[f"{name}.weight"]
                    out[f"{name}.weight"] = self.weight(name).to(dense.dtype)
        return out


def clip(W: torch.Tensor, gram: torch.Tensor, grid: Grid, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The (scale, zero), each (O, G), that minimise the mean of (sum_c x_c (Q(w_c) - w_c))^2 per row and group of W (O, I).

    `gram` (G, g, g) is the mean of x xᵀ in each group. The range is clipped to +-m, m = max|w| (1 - i/20), i = 0 … steps-1
    (llm-awq `auto_clip.py`; i = 0 is the unclipped range, so the error never grows); asymmetric grids try the zero-point's
    both roundings, since a range clipped on both sides puts it exactly between two codes.
    """
    G, g = gram.shape[0], gram.shape[1]
    scales, zeros = [], []
    for w in W.split(max(1, _CHUNK // W.shape[1])):
        v = w.view(len(w), G, g)
        lo, hi = v.amin(-1), v.amax(-1)
        most = torch.maximum(hi, -lo)

        def loss(s: torch.Tensor, z: torch.Tensor, v: torch.Tensor = v) -> torch.Tensor:
            delta = round_to(v, s, z, grid).sub_(v).transpose(0, 1)
            return (torch.bmm(delta, gram) * delta).sum(-1).T

        bounds = (most * (1 - i / 20) for i in range(steps))
        tried = (found for m in bounds for found in ranges(torch.maximum(lo, -m), torch.minimum(hi, m), grid))
        scale, zero = pick_least(fit_range(lo, hi, grid), tried, loss)
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(scales), torch.cat(zeros)


def compress(block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype) -> Result:
    """Scale, clip and round one block."""
    grid = Grid(
        config.bits,
        config.group_size,
        config.symmetric,
        scale_dtype,
        extend_zero=config.extend_zero,
        sym_scale=config.sym_scale,
    )
    found = [(m, *search(block, m, stats, config, run, grid)) for m in active(block)]
    fold = Fold(block, [(m, s) for m, s, _ in found])
    left_alone = {c for m, _, record in found if not record.get("clip", True) for c in m.consumers}
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    for name in block.weights:
        W, fitted, own = fold.weight(name), None, grid.at(block.params.get(name))
        if config.clip and name not in block.no_clip | left_alone:
            fitted = clip(W, _gram(stats[name], fold.columns.get(name)), own, config.clip_steps)
        packed[name], errors[name] = quantize(W, own, fitted)
    return Result(packed, fold.tensors(), errors, {"scales": [r for *_, r in found]})

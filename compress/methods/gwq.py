"""GWQ: the weights with the largest gradients are kept in 16 bits, the others rounded (arXiv 2411.00850).

    W_hat = M * E(W) + (1 - M) * Q(W),     M = top ceil(fraction * numel) of  S = sum over samples of |dL_n/dW|

L_n is the mean next-token cross entropy of sample n, E a 16-bit dtype. Only the paper's abstract is public and no official code is
known: gradients locate the top 1 %, these stay in 16 bits, the average is below 4 bits, one calibration sample suffices. Everything
else is our choice (docs/gwq.md, with the ablation): |g| per sample, an exact count per tensor, groups of 16 fitted to the weights
that are not kept, 3-bit scales over 16 rows (SpQR, arXiv 2306.03078), plain rounding. `quality` rounds with GPTQ's compensation
around the kept weights, which are then kept as compensated (damping 1, as SpQR); a row never ends above plain rounding on the same
grid, nor a linear above the plain mode. `abs-ge` is ours: |g| times the rounding error. The other scores are what to compare with:
magnitude, random, hessian (SpQR's (w - Q(w))² / U_cc²).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError, nearest
from compress.formats import int_grouped, int_grouped_outliers
from compress.methods import _outliers, _second_order, _solvers
from compress.methods._inputs import readers, stages
from compress.methods._pack import pack_codes
from compress.methods._quantizer import Grid, check_grid, check_groups, encode, fake
from compress.stats import InputStats
from compress.types import Block, Collect, Packed, Reducer, Result, Runner

CALIBRATED = True
__all__ = ["CALIBRATED", "Config", "collects", "compress", "observes", "reducer", "settle", "stages", "workspace"]
GRADIENT = ("abs", "abs-gw", "abs-ge", "sq")
SCORES = (*GRADIENT, "magnitude", "random", "hessian")
_CANDIDATES = 16  # times its share that one tensor may hold in the global scope


@dataclass(frozen=True, slots=True)
class Config:
    """Options of GWQ."""

    bits: int = field(default=3, metadata={"help": "bits of the weights that are rounded: 2, 3, 4 or 8"})
    group_size: int = field(default=16, metadata={"help": "inputs that share a scale, a multiple of 16; -1: a whole row"})
    symmetric: bool = field(default=False, metadata={"help": "no zero-points"})
    fraction: float = field(default=0.01, metadata={"help": "share of the weights that is kept in 16 bits, 0 to 1"})
    score: str = field(default="abs", metadata={"help": "what is kept: largest " + ", ".join(SCORES) + " (abs: |gradient|)"})
    scope: str = field(default="tensor", metadata={"help": "the share is of each tensor, or of the whole model (global)"})
    samples: int = field(default=16, metadata={"help": "calibration windows, the first ones, for gradients; the paper: 1"})
    second_level: str = field(default="auto", metadata={"help": "3-bit scales over 16 rows: on, off, auto (groups of at most 32)"})
    clip: bool = field(default=True, metadata={"help": "shrink each group's range to the least squared error"})
    quality: bool = field(default=False, metadata={"help": "GPTQ compensation around the kept weights, fitted ranges"})
    damp: float = field(default=1.0, metadata={"help": "share of the mean diagonal added to the Hessian (quality, score hessian)"})

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, "full")
        if self.group_size != -1 and self.group_size % 16:
            raise CompressError(f"--group-size {self.group_size}: gwq has multiples of 16, or -1", hint="16 or 128", usage=True)
        for option, known in (("score", SCORES), ("scope", ("tensor", "global")), ("second_level", ("auto", "on", "off"))):
            value = getattr(self, option)
            if value not in known:
                raise CompressError(
                    f"--{option.replace('_', '-')} {value!r} is unknown", hint=nearest(value, list(known)), usage=True
                )
        if not 0 <= self.fraction <= 1:
            raise CompressError(f"--fraction {self.fraction} is not in 0..1", hint="0.01 keeps one weight in a hundred", usage=True)
        if self.samples < 1:
            raise CompressError(f"--samples {self.samples} is not a number of windows", hint="1 is the paper's", usage=True)
        if not 0 <= self.damp <= 10:
            raise CompressError("--damp must be in 0..10", hint="1 is SpQR's", usage=True)
        if self.scope == "global" and self.score not in GRADIENT:
            raise CompressError(f"--scope global needs a gradient score, not {self.score}", hint="--score abs", usage=True)

    @property
    def propagate(self) -> bool:
        """Compensation calibrates each block on the compressed blocks before it."""
        return self.quality

    @property
    def sequential(self) -> bool:
        """And each group of linears on the compressed ones before it."""
        return self.quality

    @property
    def second(self) -> bool:
        """Whether scales are quantized too."""
        return self.second_level == "on" or (self.second_level == "auto" and 0 < self.group_size <= 32)

    @property
    def kind(self) -> str:
        """Kind of the linears; nothing kept and plain scales are plain `int_grouped`."""
        return int_grouped_outliers.KIND if self.fraction > 0 or self.second else int_grouped.KIND

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a linear (O, I) that this configuration cannot hold."""
        check_groups(name, shape[1], self.group_size)

    def params(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Format parameters of a linear (O, I)."""
        own = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        if self.kind == int_grouped.KIND:
            return own
        return {**own, "outliers": _outliers.count(self.fraction, shape[0] * shape[1]), "second_level": self.second}


class Located:
    """`types.Reducer`: flat indices of each linear's largest scores, largest first; its share, or more in global scope."""

    def __init__(self, block: Block, config: Config) -> None:
        self._weights, self._sparse, self._config = block.weights, block.sparse, config
        self._scores: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        g = dy.float().T @ x.float()
        if self._config.score == "abs-gw":
            g *= self._weights[name].float()
        g = g.square_() if self._config.score == "sq" else g.abs_()
        self._scores[name] = self._scores[name].add_(g) if name in self._scores else g

    def result(self) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, W in self._weights.items():
            score = self._scores.pop(name, None)
            if score is None or not bool(score.any()):  # an expert that saw no token
                out[f"unseen:{name}"] = torch.ones(1)
                score = W.float().abs() if self._config.scope == "tensor" else torch.zeros(W.shape, device=W.device)
            if self._config.score == "abs-ge":
                score = score * fake(W.float().contiguous(), _grid(self._config, torch.float32)).sub_(W.float()).abs_()
            if name in self._sparse:  # a weight that is gone needs no place beside the grid
                score = score.masked_fill(W == 0, 0.0)
            most = 1 if self._config.scope == "tensor" else _CANDIDATES
            index = _outliers.top(score, min(W.numel(), most * _outliers.count(self._config.fraction, W.numel())))
            out[name] = index.to(torch.int32)
            if self._config.scope == "global":
                out[f"score:{name}"], out[f"numel:{name}"] = score.view(-1)[index], torch.tensor(W.numel())
        return out


def _grid(config: Config, scale_dtype: torch.dtype) -> Grid:
    return Grid(config.bits, config.group_size, config.symmetric, scale_dtype)


def reducer(block: Block, config: Config) -> Reducer | None:
    """What the reverse walk shall keep of a block's gradients; None: no gradients are needed."""
    return Located(block, config) if config.score in GRADIENT and 0 < config.fraction < 1 else None


def settle(results: Callable[[], Iterator[Mapping[str, torch.Tensor]]], config: Config) -> list[dict[str, dict[str, int]]]:
    """Format params of the linears of each block, decided by all blocks' results: how many outliers each holds in global scope.

    Exactly ceil(fraction * all weights) in total, the largest scores among each tensor's candidates: at most 16 times its share
    (`at_limit` in the manifest where that binds); of equal scores the first blocks' and linears'. Scores are found by the 16 upper
    and the 16 lower bits of their fp32 representation, which orders numbers >= 0, so that one block's are in memory at a time.
    """
    if config.scope == "tensor":
        return []
    total = 0
    counts = [torch.zeros(1 << 15, dtype=torch.int64), torch.zeros(1 << 16, dtype=torch.int64)]

    def least(level: int, wanted: int) -> tuple[int, int]:
        """The bin of the wanted-th largest number, and how many lie above that bin."""
        above = counts[level].flip(0).cumsum(0)
        place = int((above < wanted).sum())
        return len(above) - 1 - place, int(above[place - 1]) if place else 0

    for result in results():
        for name, score in _scores(result):
            total += int(result[f"numel:{name}"])
            counts[0] += (score.view(torch.int32) >> 16).bincount(minlength=len(counts[0]))
    k = _outliers.count(config.fraction, total)
    high, above = least(0, k)
    for result in results():
        for _, score in _scores(result):
            bits = score.view(torch.int32)
            counts[1] += (bits[bits >> 16 == high] & 0xFFFF).bincount(minlength=len(counts[1]))
    low, more = least(1, k - above)
    limit, ties = (high << 16) + low, k - above - more
    out = []
    for result in results():
        block = {}
        for name, score in _scores(result):
            bits = score.view(torch.int32)
            equal = min(ties, int((bits == limit).sum()))
            ties -= equal
            block[name] = {"outliers": int((bits > limit).sum()) + equal}
        out.append(block)
    return out


def _scores(result: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for key in sorted(result):
        if key.startswith("score:"):
            yield key.removeprefix("score:"), result[key]


def observes(config: Config) -> bool:
    """Whether the forward walk has to run text through the blocks."""
    return config.quality or config.score == "hessian"


def collects(block: Block, config: Config) -> Collect:
    """One Hessian per input where there is compensation."""
    return _second_order.collects(block, config) if observes(config) else Collect()


def workspace(block: Block, config: Config) -> int:
    """Bytes that `compress` needs for its largest linear: scores, mask, fp32 copies, and the Hessian's where there is one."""
    largest = max(W.numel() for W in block.weights.values())
    inputs = max(W.shape[1] for W in block.weights.values()) if observes(config) else 0
    return 28 * largest + 16 * inputs * inputs


def _kept(block: Block, name: str, config: Config, factor: _solvers.Factor | None, grid: Grid) -> torch.Tensor:
    """(O, I) bool: the weights of one linear that are not rounded."""
    W = block.weights[name]
    k = int(block.params[name].get("outliers", 0))
    if k in (0, W.numel()):
        return torch.full(W.shape, k > 0, device=W.device)
    if config.score in GRADIENT:
        return _outliers.mask(block.gradient[name][:k].to(W.device), W.shape)
    if config.score == "random":
        place = list(block.params).index(name)
        score = torch.rand(W.shape, generator=torch.Generator().manual_seed(1000 * block.index + place)).to(W.device)
    elif config.score == "magnitude":
        score = W.float().abs()
    else:
        assert factor is not None
        score = fake(W.float(), grid).sub_(W.float()).square_().mul_(factor.cost())
    return _outliers.mask(_outliers.top(score, k), W.shape)


def _plain(W: torch.Tensor, kept: torch.Tensor, fitted: _outliers.Fitted, grid: Grid, E: torch.dtype) -> _solvers.Solved:
    """Nearest codes of the weights that are not kept, and the kept ones in dtype E."""
    q = encode(W.masked_fill(kept, 0.0), fitted.scale, fitted.zero, grid)
    return _solvers.Solved(q, fitted.scale, fitted.zero, W.to(E).float().mul_(kept))


def _compensated(
    W: torch.Tensor, kept: torch.Tensor, fitted: _outliers.Fitted, grid: Grid, E: torch.dtype, H: torch.Tensor,
    factor: _solvers.Factor, sparse: bool,
) -> tuple[_solvers.Solved, float]:  # fmt: skip
    """GPTQ around the kept weights on a given grid, row by row never worse than nearest codes there; and its loss."""
    rows = max(_solvers.LEAST_ROWS, _solvers.CHUNK // W.shape[1])
    nearest_codes = _plain(W, kept, fitted, grid, E)
    parts, total = [], 0.0
    for start in range(0, len(W), rows):
        piece = slice(start, start + rows)
        fixed = (fitted.scale[piece], fitted.zero[piece])
        gone = (W[piece] == 0) & ~kept[piece] if sparse else None
        solved = _solvers.solve(W[piece], factor, grid, fixed=fixed, kept=_solvers.Kept(kept[piece], E), gone=gone)
        other = _solvers.Solved(*(p[piece] for p in nearest_codes.parts))
        best, loss, _ = _solvers.better_rows(W[piece], H, solved, other)
        parts.append(best)
        total += loss
    return _solvers.join(parts), total


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Keep, fit and round the linears of one block."""
    grid = _grid(config, scale_dtype)
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    record: list[dict[str, Any]] = []
    for names in readers(block):
        H, factor = None, None
        if observes(config):
            H = stats[names[0]].hessian()
            order = "static" if config.quality else "off"
            factor = _solvers.factorize(H.clone(), config.damp, order, grid.group_size, names[0])
        for n in names:
            packed[n], errors[n], facts = _linear(block, n, config, grid.at(block.params[n]), H, factor)
            record += [{"linears": [n], **facts}] if facts else []
    unseen = sorted(n for n in packed if f"unseen:{n}" in block.gradient)
    limit = [] if config.scope == "tensor" else [n for n in packed if _at_limit(block, n)]
    return Result(packed, {}, errors, {k: v for k, v in (("hessian", record), ("by_magnitude", unseen), ("at_limit", limit)) if v})


def _at_limit(block: Block, name: str) -> bool:
    """Whether a linear holds all of its candidates, so that in a truly global choice it might hold more."""
    return int(block.params[name].get("outliers", 0)) == block.gradient[name].numel() < block.weights[name].numel()


def _linear(
    block: Block, name: str, config: Config, grid: Grid, H: torch.Tensor | None, factor: _solvers.Factor | None
) -> tuple[Packed, float, dict[str, Any]]:  # fmt: skip
    """One linear packed, its relative error, and its line in the manifest."""
    W = block.weights[name].float().contiguous()
    E = grid.scale_dtype
    kept = _kept(block, name, config, factor, grid)
    statistics = E if config.second else None
    fitted = _outliers.fit_others(W, kept, grid, torch.ones_like(W[0]) if config.clip else None, statistics)
    solved, facts = _plain(W, kept, fitted, grid, E), {}
    if config.quality:
        assert H is not None
        assert factor is not None
        base = float(_solvers.row_losses(W, solved, H).sum(dtype=torch.float64))
        weighted = _outliers.fit_others(W, kept, grid, factor.cost(), statistics)
        better, loss = _compensated(W, kept, weighted, grid, E, H, factor, name in block.sparse)
        if loss <= base:
            solved, fitted = better, weighted
        facts = _solvers.facts(factor, min(loss, base) / len(W), base / len(W))
    assert solved.value is not None
    if not torch.isfinite(solved.value).all():
        raise CompressError(f"{name}: a weight to keep does not fit into {E}", hint="start from a bfloat16 copy of the checkpoint")
    if config.kind == int_grouped.KIND:
        return *pack_codes(W, solved.q, solved.scale, solved.zero, grid), facts
    return *_outliers.pack(W, solved, kept, fitted, grid, E), facts

"""LOST's shape after training: thin factors and whole columns, chosen and refitted together under the inputs' covariance.

    minimise over L, R, I   tr((W - L - R P_I) C (W - L - R P_I)ᵀ),    rank(L) <= r,  |I| = s,  C = mean over tokens of x xᵀ

LOST (arXiv 2508.02668) initialises layers that are then trained: y = γ B σ(A x) + (1 - γ) W_s x_I, channels by the norm of the
complement's columns. Here nothing lies between the factors, and B A + R P_I approximates the weight: the exact optimum for each
choice of columns (`_lowrank`), columns by several rules, the best of them kept, then alternation. The paper's parts are options:
`--weighting none --selector lost --no-refit --columns 0.05 --scope matrix`.

Rank and columns of every linear are chosen under one budget for the model (`_budget`), from errors measured on the dense model.
With `importance` "gradient" an error counts by the mean squared gradient of the loss at that output: between linears in the budget,
between the outputs of one in its factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError, nearest
from compress.methods import _budget, _factorize, _lowrank
from compress.methods._factorize import workspace
from compress.methods._inputs import per_input, readers, stages
from compress.stats import InputStats
from compress.types import Block, Collect, Packed, Reducer, Result, Runner, Stat

VERB = "factorize"
CALIBRATED = True
__all__ = [
    "CALIBRATED", "VERB", "Config", "collects", "compress", "observes", "reducer", "seconds", "settle",
    "stages", "survey", "survey_collects", "survey_observes", "surveys", "workspace",
]  # fmt: skip
GRID = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # shares of the inputs that are kept as columns
ROWS = 0.1  # added to each output's share of the gradients, whose mean is 1
QUICK = ("weight",)  # selectors that the survey measures with
WEIGHTINGS, SCOPES, IMPORTANCE = ("covariance", "diagonal", "none"), ("model", "matrix"), ("gradient", "relative")


@dataclass(frozen=True, slots=True)
class Config(_factorize.Factorize):
    """Options of LOST."""

    weighting: str = field(default="covariance", metadata={"help": "what an input's error counts: covariance, diagonal, none"})
    scope: str = field(default="model", metadata={"help": "where the share is kept: in the whole model, or in every matrix"})
    importance: str = field(default="gradient", metadata={"help": "a linear's error counts by the loss's gradient, or relative"})
    selector: str = field(default="auto", metadata={"help": "columns by lost, diag, obs, weight, greedy; auto: the best of them"})
    columns: float = field(default=-1.0, metadata={"help": "share of the inputs kept as columns, the same everywhere; -1: chosen"})
    refit: bool = field(default=True, metadata={"help": "factors and columns solved together; not: one after the other, as LOST"})
    compact: bool = field(default=True, metadata={"help": "no parameters for the kept columns in A"})
    rank_multiple: int = field(default=16, metadata={"help": "ranks are multiples of this"})
    damp: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the covariance"})
    samples: int = field(default=16, metadata={"help": "calibration windows that gradients are taken from"})
    sequential: bool = field(default=False, metadata={"help": "collect again after every group of linears (qkv, o, gate/up, down)"})
    propagate: bool = field(default=True, metadata={"help": "calibrate each block on the factorized blocks before it"})

    def __post_init__(self) -> None:
        if self.weighting == "none":  # then nothing is collected
            object.__setattr__(self, "sequential", False)
            object.__setattr__(self, "propagate", self.recover > 0)
        _factorize.Factorize.__post_init__(self)
        known = {"weighting": WEIGHTINGS, "scope": SCOPES, "importance": IMPORTANCE, "selector": ("auto", *_lowrank.SELECTORS)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                hint = nearest(getattr(self, name), list(values))
                raise CompressError(f"--{name} {getattr(self, name)!r} is unknown", hint=hint, usage=True)
        if self.sequential and not self.propagate:
            raise CompressError("--sequential needs factorized blocks to go on from", hint="drop --sequential", usage=True)
        if self.columns != -1 and not 0 <= self.columns <= 1:
            raise CompressError(f"--columns {self.columns} is not in 0..1", hint="leave it out, or 0.05", usage=True)
        if self.columns != -1 and self.scope == "model":
            raise CompressError("--columns fixes what --scope model chooses", hint="add --scope matrix", usage=True)
        for name in ("rank_multiple", "samples"):
            if getattr(self, name) < 1:
                raise CompressError(f"--{name.replace('_', '-')} must be 1 or more", hint="leave it out", usage=True)
        if not 0 <= self.damp <= 10:
            raise CompressError("--damp must be in 0..10", hint="0.01 is usual", usage=True)

    @property
    def selectors(self) -> tuple[str, ...]:
        """Rules that columns are tried by."""
        return _lowrank.SELECTORS if self.selector == "auto" else (self.selector,)

    def params(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Format parameters of a linear (O, I); where they are chosen later, those of a plain low rank of the same size."""
        if self.columns == -1:
            return _factorize.Factorize.params(self, shape)
        return self.split(int(self.columns * shape[1]), shape)

    def split(self, columns: int, shape: tuple[int, int]) -> dict[str, Any]:
        """Rank and columns within a linear's own budget: the rank rounded down, and columns for what that leaves."""
        budget = self.budget(shape)
        columns = min(columns, budget // shape[0])
        rank = _budget.rank_of(budget, columns, shape, self.rank_multiple, self.compact)
        if rank < 1 and not columns:
            rank = _budget.rank_of(budget, columns, shape)
        while columns and columns < shape[1] and _budget.cost_of(rank, columns + 1, shape, self.compact) <= budget:
            columns += 1
        return self.chosen(0 if columns == shape[1] else rank, columns)

    def chosen(self, rank: int, columns: int) -> dict[str, Any]:
        """Format parameters of a rank and a number of columns."""
        own = {} if self.compact or not columns else {"compact": False}
        return {"rank": rank, "columns": columns, **own, **self.stored}


# -- how much each linear gets ---------------------------------------------------------------------------------------------


def surveys(config: Config) -> bool:
    """Whether ranks and columns are chosen by measurements of the whole model."""
    return config.columns == -1


def survey_observes(config: Config) -> bool:
    """Whether that takes text."""
    return config.weighting != "none"


def survey_collects(block: Block, config: Config) -> Collect:
    """One second moment per input, of as many numbers as the weighting needs."""
    return per_input(block, {"covariance": Stat.GRAM, "diagonal": Stat.ENERGY, "none": Stat.NONE}[config.weighting])


def survey(
    block: Block, stats: Mapping[str, InputStats], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of every linear the least errors over columns and ranks (len(GRID), k + 1) fp64; later blocks see dense ones."""
    kept: dict[str, torch.Tensor] = {}
    for name, problem in _problems(block, stats, config):
        O, I = problem.shape
        start = torch.empty(0, dtype=torch.int64, device=problem.W.device)
        rows = []
        selectors = QUICK if config.selector == "auto" else config.selectors
        for s in _columns(I):
            rank = min(max(0, _budget.rank_of(config.budget((O, I)), s, (O, I), 1, config.compact)), min(O, I))
            U = problem.basis(start, 0 if selectors == QUICK or not s else rank)
            tried = [problem.choose(which, U, s).sort().values for which in (selectors if s else selectors[:1])]
            rows.append(torch.stack([problem.tail(c) for c in tried]).amin(0).cpu())
        kept[f"tails:{name}"] = torch.stack(rows)
        kept[f"facts:{name}"] = torch.tensor([O, I, problem.total * problem.C.scale], dtype=torch.float64)
    return kept, {}


def _columns(inputs: int) -> list[int]:
    return sorted({int(share * inputs) for share in GRID})


class Sensitivity:
    """`types.Reducer`: the mean over tokens of (dL/dy)² of every linear's outputs (O,)."""

    def __init__(self, block: Block) -> None:
        self._sum = {name: torch.zeros(W.shape[0], dtype=torch.float64, device=W.device) for name, W in block.weights.items()}
        self._tokens = dict.fromkeys(self._sum, 0)

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        self._sum[name] += dy.float().square().sum(0, dtype=torch.float64)
        self._tokens[name] += len(dy)

    def result(self) -> dict[str, torch.Tensor]:
        return {f"gradient:{name}": found / max(1, self._tokens[name]) for name, found in self._sum.items()}


def reducer(block: Block, config: Config) -> Reducer | None:
    """Gradients weigh linears against each other where they share a budget."""
    return Sensitivity(block) if surveys(config) and config.scope == "model" and config.importance == "gradient" else None


def settle(results: Callable[[], Iterator[Mapping[str, torch.Tensor]]], config: Config) -> list[dict[str, dict[str, Any]]]:
    """Rank and columns of every linear."""
    if not surveys(config):
        return []
    names: list[list[str]] = []
    linears: list[_budget.Options] = []
    total = 0
    for found in results():
        names.append([n.removeprefix("facts:") for n in found if n.startswith("facts:")])
        for name in names[-1]:
            O, I, energy = found[f"facts:{name}"].tolist()
            shape = (int(O), int(I))
            gradient = f"gradient:{name}"
            weight = energy * float(found[gradient].mean()) if gradient in found else 1.0
            tails = found[f"tails:{name}"]
            linears.append(_budget.options(tails, _columns(shape[1]), shape, weight, config.rank_multiple, config.compact))
            total += shape[0] * shape[1]
    if config.scope == "matrix":
        chosen = [_within(o, config) for o in linears]
    else:
        assert config.keep is not None
        picked = _budget.allocate(linears, int(config.keep * total + 1e-6))
        if picked is None:
            why = f"--keep {config.keep} is less than ranks of {config.rank_multiple} everywhere take"
            raise CompressError(why, hint="a smaller --rank-multiple, or a larger --keep")
        chosen = [config.chosen(o.rank[k], o.columns[k]) for o, k in zip(linears, picked, strict=True)]
    rest = iter(chosen)
    return [{name: next(rest) for name in block} for block in names]


def _within(o: _budget.Options, config: Config) -> dict[str, Any]:
    """The best option of a linear that keeps the share itself; its last option is the whole weight."""
    shape = (o.cost[-1] // o.columns[-1], o.columns[-1])
    fits = [k for k in range(len(o.cost)) if o.cost[k] <= config.budget(shape)]
    return config.split(o.columns[fits[-1]] if fits else 0, shape)


def seconds(config: Config, weights: int) -> float:
    """Measured on one core for inputs of 576 to 1536 channels; grows with the width."""
    return 1.5e-6 * weights


# -- factors ---------------------------------------------------------------------------------------------------------------


def observes(config: Config) -> bool:
    """Whether text runs through the blocks while they are factorized."""
    return config.weighting != "none" or config.recover > 0


def collects(block: Block, config: Config) -> Collect:
    """As the survey."""
    return survey_collects(block, config)


def _problems(block: Block, stats: Mapping[str, InputStats], config: Config) -> Iterator[tuple[str, _lowrank.Problem]]:
    for names in readers(block):
        W = block.weights[names[0]]
        if config.weighting == "none":
            C = _lowrank.plain(W.shape[1], W.device)
        elif config.weighting == "diagonal":
            C = _lowrank.moment(stats[names[0]].energy(), config.damp, names[0])
        else:
            C = _lowrank.moment(stats[names[0]].hessian(), config.damp, names[0])
        for name in names:
            g = block.gradient.get(f"gradient:{name}")
            rows = None if g is None or not float(g.mean()) else g / g.mean() + ROWS
            yield name, _lowrank.Problem(block.weights[name], C, rows if rows is None else rows.to(W.device))


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Factorize every linear of the block."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    record: list[dict[str, Any]] = []
    for name, problem in _problems(block, stats, config):
        params = block.params[name]
        rank, columns = int(params["rank"]), int(params["columns"])
        found, won = _lowrank.search(problem, rank, columns, config.selectors, refit=config.refit)
        packed[name], errors[name] = _factorize.finish(block.weights[name], problem, found, config, params, scale_dtype, name)
        facts = {"rank": rank, "columns": columns, "loss": float(f"{found.error:.6g}"), "damp": float(f"{problem.C.damp:.6g}")}
        record.append({"linear": name, **facts, **({"selector": won} if won else {})})
    return Result(packed, errors=errors, record={"factors": record})

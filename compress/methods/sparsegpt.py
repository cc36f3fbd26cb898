"""SparseGPT: pruning with second-order error compensation (arXiv 2301.00774).

    minimise over masks and values   tr((W - W_hat) H (W - W_hat)ᵀ),     H = sum over tokens of x xᵀ

Blocks in order, each calibrated on the pruned blocks before it (IST-DASLab/sparsegpt `llama.py`); with `sequential`, there
`--true-sequential`, also each group of linears on the pruned groups before it. Solver: `_sparse_solver`. A Hessian that is not
positive definite is damped step by step, and the manifest says how much; there is no silent identity.

`refit` is not in the paper: it improves the values that stay, mask fixed, so that no row's loss is above the paper's algorithm's.
Where recovery trains them anyway it gained nothing (docs/log.md), and is left out unless asked for.

`importance` gradient is ours. It weighs the error of output o by d_o, the mean of (dL/dy_o)² over the calibration text, a Kronecker
factor of the loss's Fisher information: minimise sum_o d_o (W - W_hat)_o H (W - W_hat)_oᵀ. A row's own solution stays what it is,
but rows compete by what the loss minds, and with `scope` model so do all linears, under one threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError, nearest
from compress.methods import _sparse_solver, _sparsity
from compress.methods._inputs import stages
from compress.methods._second_order import collects
from compress.methods._sparsity import settle, surveys
from compress.stats import InputStats
from compress.types import Block, Packed, Reducer, Result, Runner

VERB = "prune"
CALIBRATED = True
__all__ = [
    "CALIBRATED", "VERB", "Config", "collects", "compress", "reducer", "settle", "spool", "stages", "survey", "survey_collects",
    "surveys", "workspace",
]  # fmt: skip
survey_collects = collects
IMPORTANCES = ("none", "gradient")
REFIT = 20
_LEAST = 1e-3  # of a linear's mean d: an output that this text's loss never reached is not free


@dataclass(frozen=True, slots=True)
class Config(_sparsity.Sparse):
    """Options of SparseGPT."""

    scope: str = field(default="matrix", metadata={"help": "where the share is counted: row, matrix, model (needs gradients)"})
    importance: str = field(default="none", metadata={"help": "gradient: errors of an output weigh as the loss minds it; none"})
    samples: int = field(default=64, metadata={"help": "calibration windows, the first ones, that gradients are taken from"})
    damp: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the Hessian"})
    refit: int | None = field(
        default=None, metadata={"help": "steps that improve the values that stay; 0: as published; default: 20, with --recover 0"}
    )
    sequential: bool = field(default=True, metadata={"help": "collect again after every group of linears (qkv, o, gate/up, down)"})
    propagate: bool = field(default=True, metadata={"help": "calibrate each block on the pruned blocks before it"})

    def __post_init__(self) -> None:
        if self.quality and self.scope == "matrix" and not self.pattern:
            object.__setattr__(self, "importance", "gradient")
            object.__setattr__(self, "scope", "model")
        _sparsity.Sparse.__post_init__(self)
        if self.refit is None:
            object.__setattr__(self, "refit", 0 if self.recover else REFIT)
        _sparsity.check_scope(self.scope, self.pattern)
        if self.importance not in IMPORTANCES:
            hint = nearest(self.importance, list(IMPORTANCES))
            raise CompressError(f"--importance {self.importance!r} is unknown", hint=hint, usage=True)
        if self.importance == "none" and self.scope == "model":
            raise CompressError("--scope model compares linears by the loss", hint="add --importance gradient", usage=True)
        if self.importance == "gradient" and (self.scope == "row" or self.pattern):
            raise CompressError("--importance gradient weighs rows against each other", hint="--scope matrix or model", usage=True)
        if not 0 <= (self.refit or 0) <= 10_000:
            raise CompressError(f"--refit {self.refit} is not a number of steps", hint="20 is usual, 0 as published", usage=True)
        if self.samples < 1:
            raise CompressError(f"--samples {self.samples} is not a number of windows", hint="use 1 or more", usage=True)
        _sparsity.check_walk(self.sequential, self.propagate)
        if not 0 <= self.damp <= 10:
            raise CompressError("--damp must be in 0..10", hint="0.01 is usual", usage=True)


def workspace(block: Block, config: Config) -> int:
    """Bytes that `compress` needs for its largest linear: copies of the Hessian and of the weights."""
    more = 1 if config.refit else 0
    return 4 * max((3 + more) * W.shape[1] ** 2 + (6 + 4 * more) * W.numel() for W in block.weights.values())


def spool(config: Config, weights: int, linears: int) -> int:
    """Bytes that the survey keeps on disk: every weight's saliency, and the histograms."""
    return (4 * weights if surveys(config) else 0) + _sparsity.spool(config, weights, linears)


def survey(
    block: Block, stats: Mapping[str, InputStats], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Saliency (O, I) fp32 of every weight of the dense model, for scope model."""
    kept = {}
    for names, factor in _sparse_solver.factors(block, stats, config.damp):
        for name in names:
            W = block.weights[name].float().masked_fill(factor.dead, 0.0)
            kept[f"saliency:{name}"] = W.div_(factor.U.diagonal()).square_()
    return kept, {}


class Minded:
    """`types.Reducer`: how much the loss minds every output, d (O,), and in scope model the histograms of d times saliency."""

    def __init__(self, block: Block, config: Config) -> None:
        self._block, self._config = block, config
        self._sum: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        d = dy.float().square().sum(0)
        self._sum[name] = self._sum[name].add_(d) if name in self._sum else d

    def result(self) -> dict[str, torch.Tensor]:
        found = {n: d for n, d in self._sum.items() if bool(d.any())}
        usual = torch.stack([d.mean() for d in found.values()]).mean() if found else torch.ones(())
        out = {}
        for name, W in self._block.weights.items():
            d = found.get(name, usual.expand(W.shape[0]))  # no gradient: an expert that saw no token
            d = d.clamp(min=_LEAST * float(d.mean()))
            out[f"minded:{name}"] = d.clone()
            if self._config.scope == "model":
                score = self._block.survey[f"saliency:{name}"].to(d.device) * d.unsqueeze(1)
                out[f"{_sparsity.HISTOGRAM}{name}"] = _sparsity.histogram(score).cpu()
        return out


def reducer(block: Block, config: Config) -> Reducer | None:
    """What the reverse walk keeps, with importance gradient."""
    return Minded(block, config) if config.importance == "gradient" else None


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Prune the linears of the block."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    record: list[dict[str, Any]] = []
    for names, factor in _sparse_solver.factors(block, stats, config.damp):
        H = _sparse_solver.damped(stats[names[0]].hessian(), factor) if config.refit else None
        for name in names:
            W = block.weights[name].float()
            minded = block.gradient.get(f"minded:{name}")
            done = _sparse_solver.sparsify(
                W, factor, share=config.share, nm=config.nm, scope=config.scope,
                outputs=None if minded is None else minded.to(W.device),
                gone=W.numel() - int(block.params[name]["nnz"]) if config.scope == "model" else None,
            )  # fmt: skip
            before = done.loss
            if H is not None:
                done = _sparse_solver.refit(W.masked_fill(factor.dead, 0.0), done, H, config.refit or 0)
            packed[name], errors[name] = _sparsity.pack(W, done.W, done.mask, config, scale_dtype, name)
            facts = {"damp": float(f"{factor.damp:.6g}"), "dead": int(factor.dead.sum()), "loss": float(f"{done.loss:.6g}")}
            facts |= {"before_refit": float(f"{before:.6g}")} if config.refit else {}
            record.append({"linears": [name], **facts})
    return Result(packed, errors=errors, record={"hessian": record})

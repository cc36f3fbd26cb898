"""SparseGPT: pruning with second-order error compensation (arXiv 2301.00774).

    minimise over masks and values   tr((W - W_hat) H (W - W_hat)ᵀ),     H = sum over tokens of x xᵀ

Blocks in order, each calibrated on the pruned blocks before it (IST-DASLab/sparsegpt `llama.py`); with `sequential`, there
`--true-sequential`, also each group of linears on the pruned groups before it. Solver: `_sparse_solver`. A Hessian that is not
positive definite is damped step by step, and the manifest says how much; there is no silent identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError
from compress.methods import _sparse_solver, _sparsity
from compress.methods._inputs import stages
from compress.methods._second_order import collects
from compress.stats import InputStats
from compress.types import Block, Packed, Result, Runner

VERB = "prune"
CALIBRATED = True
__all__ = ["CALIBRATED", "VERB", "Config", "collects", "compress", "stages", "workspace"]


@dataclass(frozen=True, slots=True)
class Config(_sparsity.Sparse):
    """Options of SparseGPT."""

    scope: str = field(default="matrix", metadata={"help": "where the share is counted: row, or matrix, in blocks of 128 columns"})
    damp: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the Hessian"})
    sequential: bool = field(default=True, metadata={"help": "collect again after every group of linears (qkv, o, gate/up, down)"})
    propagate: bool = field(default=True, metadata={"help": "calibrate each block on the pruned blocks before it"})

    def __post_init__(self) -> None:
        _sparsity.Sparse.__post_init__(self)
        _sparsity.check_scope(self.scope, self.pattern, ("row", "matrix"))
        _sparsity.check_walk(self.sequential, self.propagate)
        if not 0 <= self.damp <= 10:
            raise CompressError("--damp must be in 0..10", hint="0.01 is usual", usage=True)


def workspace(block: Block, config: Config) -> int:
    """Bytes that `compress` needs for its largest linear: copies of the Hessian and of the weights."""
    return 4 * max(3 * W.shape[1] ** 2 + 6 * W.numel() for W in block.weights.values())


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Prune the linears of the block."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    record: list[dict[str, Any]] = []
    for names, factor in _sparse_solver.factors(block, stats, config.damp):
        for name in names:
            W = block.weights[name].float()
            done = _sparse_solver.sparsify(W, factor, share=config.share, nm=config.nm, scope=config.scope)
            packed[name], errors[name] = _sparsity.pack(W, done.W, done.mask, config, scale_dtype, name)
            facts = {"damp": float(f"{factor.damp:.6g}"), "dead": int(factor.dead.sum()), "loss": float(f"{done.loss:.6g}")}
            record.append({"linears": [name], **facts})
    return Result(packed, errors=errors, record={"hessian": record})

"""NoWag-P: Wanda's score on weights whose columns and rows have been normalised (arXiv 2504.14569).

    minimise over masks   sum_ij (1 - M_ij) W_bar_ij² h_j,     W = diag(r2) W_bar diag(r1),  h_j = mean over tokens of x_j²

Source: LawrenceRLiu/NoWag `src/sparse_compress.py`. All statistics come from the dense model, as there; what stays is unchanged.
The manifest holds every linear's proxy loss, relative to that of an all-zero weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compress.methods import _sparsity
from compress.methods._inputs import per_input
from compress.methods._masks import normalise
from compress.methods._sparsity import settle, spool, surveys
from compress.stats import InputStats
from compress.types import Block, Collect, Result, Runner, Stat

VERB = "prune"
CALIBRATED = True
__all__ = ["CALIBRATED", "VERB", "Config", "collects", "compress", "settle", "spool", "survey", "survey_collects", "surveys"]


@dataclass(frozen=True, slots=True)
class Config(_sparsity.Sparse):
    """Options of NoWag-P."""

    scope: str = field(default="matrix", metadata={"help": "where the share is counted: row, matrix (the paper's), model"})
    propagate: bool = field(default=False, metadata={"help": "calibrate each block on the pruned blocks before it"})

    def __post_init__(self) -> None:
        _sparsity.Sparse.__post_init__(self)
        _sparsity.check_scope(self.scope, self.pattern)


def collects(block: Block, config: Config) -> Collect:
    """One energy per input."""
    return per_input(block, Stat.ENERGY)


survey_collects = collects


def _score(stats: Mapping[str, InputStats]) -> _sparsity.Score:
    return lambda name, W: normalise(W).W.square_() * stats[name].energy()


def survey(
    block: Block, stats: Mapping[str, InputStats], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Histograms of the block's scores."""
    return _sparsity.histograms(block, _score(stats))


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Prune every linear of the block."""
    record: list[dict[str, Any]] = []

    def note(name: str, score: torch.Tensor, mask: torch.Tensor) -> None:
        lost = float((score * ~mask).sum(dtype=torch.float64) / score.sum(dtype=torch.float64).clamp(min=1e-30))
        record.append({"linear": name, "proxy_loss": float(f"{lost:.6g}")})

    result = _sparsity.masked(block, _score(stats), config, scale_dtype, note)
    return replace(result, record={"nowag": record})

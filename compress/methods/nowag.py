"""NoWag-P: Wanda's score on weights whose columns and rows have been normalised (arXiv 2504.14569).

    minimise over masks   sum_ij (1 - M_ij) W_bar_ij² h_j,     W = diag(r2) W_bar diag(r1),  h_j = mean over tokens of x_j²

Source: LawrenceRLiu/NoWag `src/sparse_compress.py`. All statistics come from the dense model, as there; what stays is unchanged.
The manifest holds every linear's proxy loss, relative to that of an all-zero weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from compress.methods import _sparsity
from compress.methods._masks import normalise
from compress.stats import InputStats
from compress.types import Block, Collect, Packed, Result, Runner, Stat

VERB = "prune"
CALIBRATED = True


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
    return _sparsity.collects(block, Stat.ENERGY)


def _score(W: torch.Tensor, stats: InputStats) -> torch.Tensor:
    return normalise(W).W.square_() * stats.energy()


def surveys(config: Config) -> bool:
    """One threshold for the model needs all scores' histogram first."""
    return config.scope == "model"


survey_collects = collects


def survey(
    block: Block, stats: Mapping[str, InputStats], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Histograms of the block's scores."""
    return {f"histogram:{n}": _sparsity.histogram(_score(W.float(), stats[n])) for n, W in block.weights.items()}, {}


def settle(results: Callable[[], Iterator[Mapping[str, torch.Tensor]]], config: Config) -> list[dict[str, dict[str, int]]]:
    """How many weights each linear keeps."""
    return _sparsity.share_out_results(results, config)


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Prune every linear of the block."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    record = []
    for name, W in _sparsity.weights(block):
        score = _score(W, stats[name])
        mask = _sparsity.select(score, config, block.params[name])
        packed[name], errors[name] = _sparsity.pack(W, W * mask, mask, config, scale_dtype, name)
        lost = float((score * ~mask).sum(dtype=torch.float64) / score.sum(dtype=torch.float64).clamp(min=1e-30))
        record.append({"linear": name, "proxy_loss": float(f"{lost:.6g}")})
    return Result(packed, errors=errors, record={"nowag": record})

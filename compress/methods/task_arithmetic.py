"""Task arithmetic: the base plus alpha times the sum of the deltas (arXiv 2212.04089).

Of the merging methods it is the one that a study of public fine-tunes of Llama and Qwen found to beat the base reliably
(docs/bundles.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from compress.methods import _merging

VERB = "merge"
CALIBRATED = False
ALPHAS = _merging.ALPHAS
ALPHA = _merging.ALPHA


@dataclass(frozen=True, slots=True)
class Config:
    """Options of `compress merge -m task-arithmetic`."""

    alpha: float | None = field(default=None, metadata={"help": "Factor of the merged delta; default: by --validation, else 0.4."})

    def __post_init__(self) -> None:
        _merging.check(self.alpha)

    trims = False
    masked = False
    lam = 0.0
    density = 1.0


def merged(tau: torch.Tensor, lambdas: Sequence[float], config: Config, trim: _merging.Trim | None) -> torch.Tensor:
    """The delta (R, C) before alpha of deltas (T, R, C)."""
    return _merging.total(tau, None)

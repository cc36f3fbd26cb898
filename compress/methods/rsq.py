"""RSQ: rotate, scale tokens by importance, quantize with GPTQ (arXiv 2503.01820).

    minimise over W_hat on the grid   tr((W' - W_hat) H (W' - W_hat)ᵀ),     H = sum over tokens of w_t x_t x_tᵀ

W' is the rotated weight (`models.rotate`: R1 and R2 folded in, so the artifact is an ordinary checkpoint), x the rotated input,
w_t the token's weight in its window (`_importance`), the same for all linears of a block. Source: ylsung/rsq `fake_quant/`. As
there, the weights come from the dense block on compressed inputs. Different: no online rotations, tied heads untied, embeddings not
centred, and the solver's defaults (see `gptq`). `rotate=False, importance="none"` is GPTQ, `importance="none"` QuaRot-style GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from compress.errors import CompressError
from compress.methods import _importance
from compress.methods._second_order import SecondOrder, collects, compress, stages, workspace
from compress.types import Rotate, TokenView

CALIBRATED = True
CORES = True  # quantizes ARMOR's cores
__all__ = ["CALIBRATED", "CORES", "Config", "collects", "compress", "stages", "token_weights", "transform", "workspace"]


@dataclass(frozen=True, slots=True)
class Config(SecondOrder):
    """Options of RSQ."""

    rotate: bool = field(default=True, metadata={"help": "fold norms and rotate the residual stream and the heads"})
    rotation_seed: int = field(default=0, metadata={"help": "seed of the rotation's signs"})
    importance: str = field(default="attention", metadata={"help": "token weights: " + ", ".join(_importance.STRATEGIES)})
    normalize: str = field(default="none", metadata={"help": "divide scores by the queries that see a token: none, linear, sqrt"})
    r_min: float = field(default=0.005, metadata={"help": "weight of the least important token"})
    r_max: float = field(default=1.0, metadata={"help": "weight of the most important token"})
    exponent: float = field(default=1.0, metadata={"help": "power of the weights: 1 as the code, 2 as the paper's formula"})
    expand: int = field(default=1, metadata={"help": "copies of the calibration windows, each shifted further; the paper uses 8"})
    share: float = field(default=0.125, metadata={"help": "of a window that first and first-last keep"})

    def __post_init__(self) -> None:
        SecondOrder.__post_init__(self)
        if not 1 <= self.expand <= 64:
            raise CompressError("--expand must be in 1..64", hint="8 is the paper's", usage=True)
        _importance.check(self.importance, self.normalize, self.r_min, self.r_max, self.share)


def transform(config: Config) -> Rotate | None:
    """The rotation that the checkpoint is read through."""
    return Rotate(config.rotation_seed) if config.rotate else None


def token_weights(view: TokenView, config: Config) -> torch.Tensor | None:
    """Weights (B, T), mean 1 per sequence; None: all equal."""
    if config.importance == "none":
        return None
    scores = _importance.scores(config.importance, view, config.share)
    return _importance.weights(scores, config.r_min, config.r_max, config.exponent, config.normalize)

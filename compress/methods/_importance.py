"""How much each calibration token counts: RSQ's importance strategies (arXiv 2503.01820; ylsung/rsq `input_weighting_module.py`).

    r_t = (a_t - min a)/(max a - min a) (r_max - r_min) + r_min,     w_t = r_t^e T / sum of r^e        per sequence and block

The scores a: `attention` the attention that a token receives, `act-norm` the length of the block's input, `act-diff` how little
the block changes it, `token-freq` how rare the token is in the calibration text, `token-sim` its mean squared distance to
the others, `first` and `first-last` 1 for that share of a window and 0 for the rest. Equal scores give equal weights (the source
divides by 0). `normalize` divides a first by the number of queries that see the token ("linear") or its square root ("sqrt").
"""

from __future__ import annotations

import torch

from compress.errors import CompressError, nearest
from compress.types import TokenView

STRATEGIES = ("none", "attention", "act-norm", "act-diff", "token-freq", "token-sim", "first", "first-last")


NORMALIZE = ("none", "linear", "sqrt")


def check(strategy: str, normalize: str, r_min: float, r_max: float, share: float) -> None:
    """Validate the options of an importance strategy."""
    if strategy not in STRATEGIES:
        raise CompressError(f"--importance {strategy!r} is unknown", hint=nearest(strategy, list(STRATEGIES)), usage=True)
    if normalize not in NORMALIZE:
        raise CompressError(f"--normalize {normalize!r} is unknown", hint="use " + ", ".join(NORMALIZE), usage=True)
    if not 0 <= r_min <= r_max or r_max <= 0:
        raise CompressError("--r-min and --r-max must satisfy 0 <= r-min <= r-max, r-max > 0", hint="0.005 and 1", usage=True)
    if not 0 < share <= 1:
        raise CompressError("--share must be in (0, 1]", hint="leave it out for the default", usage=True)


def scores(strategy: str, view: TokenView, share: float) -> torch.Tensor:
    """Raw scores (B, T), fp32; larger is more important."""
    if strategy == "attention":
        return view.attention()
    if strategy == "token-freq":
        return -view.counts().float()
    x = view.hidden().float()
    if strategy == "act-norm":
        return x.norm(dim=-1)
    if strategy == "act-diff":
        return -(view.output().float() - x).norm(dim=-1)
    if strategy == "token-sim":
        square, mean = x.square().sum(-1), x.mean(1, keepdim=True)
        return square - 2 * (x * mean).sum(-1) + square.mean(1, keepdim=True)
    T = x.shape[1]
    chosen = torch.zeros(x.shape[:2], device=x.device)
    if strategy == "first":
        chosen[:, : max(1, round(T * share))] = 1
    else:
        half = max(1, round(T * share / 2))
        chosen[:, :half] = chosen[:, T - half :] = 1
    return chosen


def weights(a: torch.Tensor, r_min: float, r_max: float, exponent: float, normalize: str = "none") -> torch.Tensor:
    """Token weights (B, T) of mean 1 per sequence from scores (B, T)."""
    if normalize != "none":
        seen = torch.arange(a.shape[1], 0, -1, device=a.device, dtype=a.dtype)
        a = a / (seen if normalize == "linear" else seen.sqrt())
    lo, hi = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
    span = hi - lo
    r = torch.where(span > 0, (a - lo) / span.clamp(min=torch.finfo(a.dtype).tiny), torch.ones_like(a)).clamp_(0, 1)
    r = (r * (r_max - r_min) + r_min).pow(exponent)
    return r * (a.shape[1] / r.sum(1, keepdim=True))

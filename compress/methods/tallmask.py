"""TALL-masks: a shared vector and one bit per parameter and task (arXiv 2405.07813), and better modes of about the same size.

    mask     v = sum of the deltas, or TIES; bit = 1[|tau_t| > lam |v - tau_t|]                    as published
    refined  v and masks of the least sum over tasks of |tau_t - s_t m_t v|² / |tau_t|²            ours
    sign     v = mean over tasks of |tau_t| / mean|tau_t|; bit = 1[tau_t >= 0]                     ours
    levels   two vectors, and the bit chooses the nearer: the two means of each coordinate         ours, one more vector

The official code is github nik-dim/tall_masks, `src/utils/tallmask_utils.py`; masks are held to it bit for bit (docs/parity.md).
Differences: masks are taken against v as stored; one fp16 factor s_t per task and tensor, by least squares (--no-rescale: 1); the
grid for lam goes up to 1, where the mask is the best one in every l_p norm. `refined` needs no lam: its v is the exact minimum,
found coordinate by coordinate, where alternating between v and masks could stop in a worse one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from compress.errors import CompressError, nearest
from compress.methods import _taskmask
from compress.methods._taskmask import Sums

VERB = "bundle"
CALIBRATED = False
MODES = ("mask", "refined", "sign", "levels")
VECTORS = ("sum", "ties")


@dataclass(frozen=True, slots=True)
class Config:
    """Options of `compress bundle -m tallmask`."""

    mode: str = field(default="levels", metadata={"help": "mask (the paper's), refined, sign or levels (ours)."})
    shared: str = field(default="int4", metadata={"help": "How the shared vector is stored: bf16, int8 or int4."})
    vector: str = field(default="sum", metadata={"help": "Mode mask: the shared vector, sum or ties."})
    density: float = field(default=0.2, metadata={"help": "Vector ties: share of each fine-tune's deltas that is kept."})
    lam: float = field(default=1.0, metadata={"help": "Mode mask: lambda of every task, where --validation does not choose it."})
    rescale: bool = field(default=True, metadata={"help": "Fit one factor per task and tensor."})
    embeddings: bool = field(default=True, metadata={"help": "Treat embedding and head as any other tensor."})

    def __post_init__(self) -> None:
        _taskmask.check_shared(self.shared)
        for name, value, known in (("mode", self.mode, MODES), ("vector", self.vector, VECTORS)):
            if value not in known:
                raise CompressError(f"--{name} {value!r} is unknown", hint=nearest(value, known), usage=True)
        if self.mode != "mask" and (self.vector != "sum" or self.lam != 1.0):
            raise CompressError(f"--vector and --lam mean nothing to --mode {self.mode}", hint="use --mode mask", usage=True)
        if not 0 < self.density <= 1:
            raise CompressError(f"--density {self.density} is not a share", hint="such as 0.2", usage=True)
        if self.lam < 0:
            raise CompressError(f"--lam {self.lam} is negative", hint="0.2 to 1", usage=True)

    @property
    def are_signs(self) -> bool:
        """Whether bits are signs."""
        return self.mode == "sign"

    @property
    def pair(self) -> bool:
        """Whether there are two shared vectors."""
        return self.mode == "levels"

    @property
    def trims(self) -> bool:
        """Whether thresholds over the whole model are needed."""
        return self.mode == "mask" and self.vector == "ties"

    @property
    def tuned(self) -> bool:
        """Whether lambda can be chosen on validation text."""
        return self.mode == "mask"


def shared(tau: torch.Tensor, sums: Sums, config: Config, trim: tuple[Sequence[float], float] | None) -> torch.Tensor:
    """v (R, C), of levels (2, R, C), of a piece of the deltas (T, R, C).

    `sums` are the whole tensor's; `trim` is the thresholds and the majority's sign.
    """
    if config.mode in ("refined", "levels"):
        factors = provisional(sums, config)
        scale = torch.tensor(factors, dtype=tau.dtype, device=tau.device).view(-1, 1, 1)
        return (_taskmask.levels if config.pair else _taskmask.refined)(tau / scale)
    if config.mode == "sign":
        return _taskmask.magnitude(tau, sums.mean_abs()) * _average(sums.mean_abs())
    if trim is not None:
        kept = _taskmask.trimmed(tau, trim[0])
        return _taskmask.disjoint(kept, _taskmask.elected(kept, trim[1]), mean=False)
    return tau.sum(0)


def _average(sizes: Sequence[float]) -> float:
    """Mean over the tasks that changed the tensor; factors near 1 fit fp16 however small the deltas are."""
    found = [s for s in sizes if s > 0]
    return sum(found) / len(found) if found else 1.0


def provisional(sums: Sums, config: Config) -> list[float]:
    """Each task's factor while v and bits are sought: of refined and levels its size against the average one, else 1."""
    sizes = sums.rms()
    if config.mode not in ("refined", "levels"):
        return [1.0] * len(sizes)
    return [s / _average(sizes) if s > 0 else 1.0 for s in sizes]


def bits(tau: torch.Tensor, v: torch.Tensor, factor: float, lam: float, config: Config) -> torch.Tensor:
    """The bits (R, C) of one task for its deltas and v as stored."""
    if config.mode == "sign":
        return _taskmask.signs(tau)
    if config.pair:
        return (tau - v[1] * factor).abs() < (tau - v[0] * factor).abs()
    return _taskmask.tall(tau, v if factor == 1.0 else v * factor, lam)


def scales(tensors: Sequence[Sums], config: Config) -> list[list[float]]:
    """s_t of every tensor and task, as stored."""
    if config.rescale:
        return [_taskmask.least_squares(s) for s in tensors]
    if config.mode == "sign":
        return [[_taskmask.half(m / _average(s.mean_abs())) for m in s.mean_abs()] for s in tensors]
    return [[_taskmask.half(f) for f in provisional(s, config)] for s in tensors]

"""ARMOR: a 2:4 core between two block-diagonal wrappers (arXiv 2510.05528).

    minimise over A, B, S   sum_ij ((A S B - W_bar)_ij)² h_j,     S = W' * M with N of every M, A and B block-diagonal

W_bar is NoWag-P's normalised weight, h the energy of the inputs. NoWag-P (A = B = I) is the start, and no linear ends above its
loss; both losses are in the manifest. Modes (docs/pruning.md compares them):

- fast (default): closed-form wrappers, exact core steps on many groups at once, L-BFGS between them (`_armor_fast`);
- paper: LawrenceRLiu/ARMOR `ARMOR_compress.py` to the letter, but that the best iterate is kept (`_armor`);
- quality: the whole covariance of the inputs in place of h, on inputs behind the pruned blocks (`_armor_quality`).

r1 and r2 of the normalisation are folded into B and A. Served as y = A S B x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError, nearest
from compress.formats import armor, sparse24
from compress.methods import _armor, _armor_fast, _armor_quality, _sparsity
from compress.methods._inputs import per_input, stages
from compress.methods._masks import normalise, parse_pattern
from compress.methods._pack import relative_error
from compress.stats import InputStats
from compress.types import Block, Collect, Packed, Result, Runner, Stat

VERB = "prune"
CALIBRATED = True
__all__ = ["CALIBRATED", "VERB", "Config", "collects", "compress", "seconds", "stages", "workspace"]
MODES = ("fast", "paper", "quality")


@dataclass(frozen=True, slots=True)
class Config(_sparsity.Sparse):
    """Options of ARMOR."""

    pattern: str = field(default="2:4", metadata={"help": "N:M of the core, N weights kept of every M inputs"})
    mode: str = field(default="fast", metadata={"help": "fast, paper, or quality (whole covariance; --quality chooses it)"})
    block: int = field(default=128, metadata={"help": "largest block of the wrappers; the largest divisor up to it is taken"})
    ragged: bool = field(default=False, metadata={"help": "take --block itself; where it does not divide, a last block is smaller"})
    restarts: int = field(default=16, metadata={"help": "of the core, at most, in modes fast and quality: fewer are faster"})
    iters: int = field(default=20_000, metadata={"help": "iterations of mode paper"})
    lr: float = field(default=1e-4, metadata={"help": "Adam's rate in mode paper"})
    draw_seed: int = field(default=0, metadata={"help": "of the groups that mode paper draws"})
    damp: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the covariance in mode quality"})
    sequential: bool = field(default=False, metadata={"help": "collect again after every group of linears (qkv, o, gate/up, down)"})
    propagate: bool = field(default=False, metadata={"help": "calibrate each block on the pruned blocks before it"})

    def __post_init__(self) -> None:
        if self.quality:
            object.__setattr__(self, "mode", "quality")
        _sparsity.Sparse.__post_init__(self)
        _sparsity.check_walk(self.sequential, self.propagate)
        if self.mode not in MODES:
            raise CompressError(f"--mode {self.mode!r} is unknown", hint=nearest(self.mode, list(MODES)), usage=True)
        if not self.pattern:
            raise CompressError("armor prunes to a pattern", hint="--pattern 2:4", usage=True)
        for name, least, most, usual in (
            ("block", self.nm[1], math.inf, 128), ("restarts", 0, math.inf, 16), ("iters", 0, math.inf, 20_000),
            ("lr", 1e-12, 1, 1e-4), ("damp", 0, 10, 0.01),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                wanted = f"at least {least}" if most == math.inf else f"in {least}..{most}"
                raise CompressError(f"--{name} {getattr(self, name)} is not {wanted}", hint=f"{usual} is usual", usage=True)

    @property
    def quality_epochs(self) -> int:
        """None: recovery after ARMOR raised SmolLM2's perplexity (docs/log.md)."""
        return 0

    @property
    def nm(self) -> tuple[int, int]:
        """(N, M) of the core."""
        n, m = parse_pattern(self.pattern)
        return n, m

    @property
    def kind(self) -> str:
        """Kind of the linears."""
        return armor.KIND

    def params(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Format parameters of a linear (O, I)."""
        n, m = self.nm
        b_out, b_in = (_armor.any_size(d, self.block, k, self.ragged) for d, k in zip(shape, (1, m), strict=True))
        return {"n": n, "m": m, "b_in": b_in, "b_out": b_out}


def collects(block: Block, config: Config) -> Collect:
    """One energy, or one covariance, per input."""
    return per_input(block, Stat.GRAM if config.mode == "quality" else Stat.ENERGY)


def workspace(block: Block, config: Config) -> int:
    """Bytes that `compress` needs for its largest linear."""
    inputs = max(W.shape[1] for W in block.weights.values()) if config.mode == "quality" else 0
    return 4 * (45 * max(W.numel() for W in block.weights.values()) + 4 * inputs**2)


def seconds(config: Config, weights: int) -> float:
    """What the optimisers take on one core, from the measurements behind docs/pruning.md."""
    each = {
        "fast": 8e-6 + 1.9e-7 * config.block,
        "paper": config.iters * (2.3e-8 + 1.9e-10 * config.block),
        "quality": 3.4e-5 + 1.9e-7 * config.block,
    }  # fmt: skip
    return weights * each[config.mode]


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Factorize every linear of the block."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    record = []
    for name, weight in block.weights.items():
        W = weight.float()
        packed[name], facts = _linear(W, stats[name], block.params[name], config, scale_dtype, name)
        errors[name] = relative_error(W, armor.dequantize(packed[name]))
        record.append({"linear": name, **{k: float(f"{v:.6g}") for k, v in facts.items()}})
    return Result(packed, errors=errors, record={"armor": record})


def _energy(stats: InputStats) -> torch.Tensor:
    """h (I,); channels that were never used get the mean of the others (ARMOR `validate_hessianDiag`)."""
    h = stats.energy()
    valid = torch.isfinite(h) & (h > 0)
    return torch.where(valid, h, h[valid].mean() if bool(valid.any()) else torch.ones_like(h))


def _linear(
    W: torch.Tensor, stats: InputStats, params: Mapping[str, Any], config: Config, dtype: torch.dtype, name: str
) -> tuple[Packed, dict[str, float]]:  # fmt: skip
    """One linear (O, I) packed, with the relative losses of NoWag-P (L0) and of what is stored (L)."""
    n, m, b_in, b_out = (int(params[key]) for key in ("n", "m", "b_in", "b_out"))
    sizes = b_out, b_in, n, m
    if config.mode == "quality":
        C = _armor_quality.damped(stats.hessian(), config.damp)
        target, wide = _armor.padded(W, b_out, b_in), _armor_quality.padded(C, b_in)
        plain = _armor_quality.nowag(target, wide, *sizes)
        plan = dataclasses.replace(_armor_quality.PLAN, restarts=min(config.restarts, _armor_quality.PLAN.restarts))
        found, _ = _armor_quality.quality(target, wide, *sizes, damp=0.0, plan=plan)
        r1, r2 = torch.ones_like(W[0]), torch.ones_like(W[:, 0])
        total = ((W @ C) * W).sum(dtype=torch.float64).clamp(min=1e-30)

        def measure(W_hat: torch.Tensor) -> float:
            E = W_hat - W
            return float(((E @ C) * E).sum(dtype=torch.float64) / total)
    else:
        h, bar = _energy(stats), normalise(W)
        target = _armor.padded(bar.W, b_out, b_in)
        energy = torch.nn.functional.pad(h, (0, target.shape[1] - len(h)), value=float(h.mean()))
        plain = _armor.start(target, energy, *sizes)
        if config.mode == "paper":
            found, _ = _armor.paper(target, energy, *sizes, iters=config.iters, lr=config.lr, seed=config.draw_seed)
        else:
            found, _ = _armor_fast.fast(target, energy, *sizes, _armor_fast.Plan(restarts=config.restarts))
        r1, r2 = bar.r1, bar.r2
        total = (bar.W.square() * h).sum(dtype=torch.float64).clamp(min=1e-30)

        def measure(W_hat: torch.Tensor) -> float:
            E = (W_hat - W) / r1 / r2.unsqueeze(1)
            return float((E.square() * h).sum(dtype=torch.float64) / total)

    A, B = (torch.eye(b, device=W.device).expand_as(t) for b, t in ((b_out, found.A), (b_in, found.B)))
    ones = _armor.Factors(A, B, _armor.padded(W, b_out, b_in) * plain.mask, plain.mask)
    base = _pack(ones, torch.ones_like(r1), torch.ones_like(r2), n, m, dtype, name)
    best = _pack(found, r1, r2, n, m, dtype, name)
    L0, L = measure(armor.dequantize(base).to(W.device)), measure(armor.dequantize(best).to(W.device))
    if not L <= L0:
        best, L = base, L0
    return best, {"L0": L0, "L": L, "ratio": L / L0 if L0 else 1.0}


def _pack(
    f: _armor.Factors, r1: torch.Tensor, r2: torch.Tensor, n: int, m: int, dtype: torch.dtype, name: str
) -> Packed:  # fmt: skip
    """Factors with r1 (I,) folded into B and r2 (O,) into A; then B's rows and A's columns get length 1, the core their lengths.

    16-bit numbers have little range, and factors are free up to these lengths. A core that still does not fit is halved as often as
    it takes, and the wrappers doubled by turns, which is exact. Padding beyond O and I is left out.
    """
    O, I = len(r2), len(r1)
    r1, r2 = (torch.nn.functional.pad(r, (0, size - len(r)), value=1.0) for r, size in ((r1, f.S.shape[1]), (r2, f.S.shape[0])))
    B, A = f.B * r1.view(len(f.B), 1, -1), f.A * r2.view(len(f.A), -1, 1)
    rows, columns = torch.linalg.vector_norm(B, dim=2), torch.linalg.vector_norm(A, dim=1)
    rows, columns = (torch.where(v > 0, v, torch.ones_like(v)) for v in (rows, columns))
    S = f.S * columns.view(-1, 1) * rows.view(1, -1)
    over = float(S.abs().max()) / torch.finfo(dtype).max
    halvings = max(0, math.frexp(over)[1]) if math.isfinite(over) else 0
    pre = (B / rows.unsqueeze(2) * 2.0 ** (halvings - halvings // 2)).to(dtype).cpu()
    post = (A / columns.unsqueeze(1) * 2.0 ** (halvings // 2)).to(dtype).cpu()
    core, mask = (S[:O, :I] / 2.0**halvings).to(dtype).cpu(), f.mask[:O, :I].cpu()
    if not all(torch.isfinite(t).all() for t in (pre, post, core)):
        raise CompressError(f"{name}: a factor does not fit into {dtype}", hint="start from a bfloat16 copy of the checkpoint")
    return armor.pack(sparse24.pack(core, mask, n=n, m=m), pre, post)

"""D-Pruner: what goes is what a domain's loss and general text both do without (arXiv 2405.06275; psunlpgroup/D-Pruner).

    score = I / mean(I) + general_weight G / mean(G),     I = sum over steps of |c1 g' * W + c2 (g' * W)² + c3 W³|
    g' = g + lambda 2 lr² reg_scale (G * g²),     * elementwise

G (O, I): what removing a weight costs on general text, SparseGPT's W²/U_cc² on weights as compensated so far, block after pruned
block (`code/general.py`). g = dL/dW: gradient of the mean next-token cross entropy of a step's domain windows, at the original
weights, or, with mode train, as in the paper, at weights that descend along g' meanwhile (`lr` is their rate then; else it is
only a constant). The lowest scores go, from the original weights. The formula is the released code's intent (`code/src/lomo.py`);
of its bugs and its loss scale nothing is kept.

The released code has c1 = c3 = 1 and no general_weight. Measured on real models (docs/dpruner.md): W³ is a thousand times g W,
which makes that magnitude pruning, and lambda's share of g' is 1e-10. So by default I is the domain's empirical Fisher information
times W², per window, and G is added at the same scale. `compensate` is ours too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError, nearest
from compress.methods import _sparse_solver, _sparsity
from compress.methods._inputs import per_input, readers
from compress.methods._masks import keep_highest, zeros
from compress.methods._sparsity import settle
from compress.stats import InputStats
from compress.types import Block, Collect, Learner, Packed, Reducer, Result, Runner, Schedule, Stat

VERB = "prune"
CALIBRATED = True
DOMAIN = True
__all__ = [
    "CALIBRATED", "DOMAIN", "VERB", "Config", "collects", "compress", "learner", "observes", "reducer", "settle", "spool",
    "survey", "survey_collects", "surveys", "training", "workspace",
]  # fmt: skip
_MOST = 1e12  # of a factor of the score: fp32 holds it times anything that a sane model has
MODES = ("still", "train")
BLOCKS = 32  # column blocks of a matrix in iterative blocking, where no width is given (`code/save_model_iterative.py`)


@dataclass(frozen=True, slots=True)
class Config(_sparsity.Sparse):
    """Options of D-Pruner."""

    scope: str = field(default="matrix", metadata={"help": "where the share is counted: row, matrix (the paper's), model"})
    blocking: str = field(default="none", metadata={"help": "columns: the share holds in every block of columns of a matrix; none"})
    block_columns: int = field(default=0, metadata={"help": "columns of such a block; 0: inputs / 32, the paper's"})
    samples: int = field(default=128, metadata={"help": "windows of the domain's text that gradients are taken from"})
    batch: int = field(default=1, metadata={"help": "windows of a step, whose mean loss gives one gradient; the paper: 8"})
    mode: str = field(default="still", metadata={"help": "still: gradients at the original weights; train: along a fine-tuning"})
    epochs: int = field(default=5, metadata={"help": "of mode train, over the domain's windows"})
    warmup: float = field(default=0.1, metadata={"help": "share of its steps in which the rate rises to --lr, to fall to 0 then"})
    clip: float = field(default=1.0, metadata={"help": "its longest gradient; longer ones are scaled down; 0: none is"})
    lam: float = field(default=0.1, metadata={"help": "weight of the penalty on changes that general text minds"})
    lr: float = field(default=0.03, metadata={"help": "step length that the penalty assumes; in mode train the highest rate"})
    reg_scale: float = field(default=1e-3, metadata={"help": "the released code's extra factor of the penalty"})
    c1: float = field(default=0.0, metadata={"help": "factor of the first-order term g W; the released code: 1"})
    c2: float = field(default=5e-4, metadata={"help": "factor of the second-order term (g W)²"})
    c3: float = field(default=0.0, metadata={"help": "factor of W³; the released code: 1"})
    general_weight: float = field(default=1.0, metadata={"help": "G is added to I with this weight, both at a mean of 1"})
    compensate: bool = field(default=False, metadata={"help": "move the weights that stay to make up for the others, as SparseGPT"})
    damp: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the Hessian of general text"})

    def __post_init__(self) -> None:
        _sparsity.Sparse.__post_init__(self)
        _sparsity.check_scope(self.scope, self.pattern)
        if self.blocking not in ("none", "columns"):
            hint = nearest(self.blocking, ["none", "columns"])
            raise CompressError(f"--blocking {self.blocking!r} is unknown", hint=hint, usage=True)
        if self.blocking == "columns" and (self.scope != "matrix" or self.pattern):
            raise CompressError("--blocking columns counts per matrix", hint="drop it, or --scope and --pattern", usage=True)
        if self.block_columns < 0 or (self.block_columns and self.blocking == "none"):
            raise CompressError("--block-columns is a width for --blocking columns", hint="such as 128", usage=True)
        for name, what in (("samples", "windows"), ("batch", "windows"), ("epochs", "epochs")):
            if getattr(self, name) < 1:
                raise CompressError(f"--{name} {getattr(self, name)} is not a number of {what}", hint="use 1 or more", usage=True)
        if self.mode not in MODES:
            raise CompressError(f"--mode {self.mode!r} is unknown", hint=nearest(self.mode, list(MODES)), usage=True)
        if not 0 <= self.warmup < 1 or not 0 <= self.clip <= _MOST:
            raise CompressError("--warmup is a share below 1, --clip a length", hint="0.1 and 1 are the paper's", usage=True)
        for name in ("lam", "lr", "reg_scale", "c1", "c2", "c3", "general_weight"):
            if not 0 <= getattr(self, name) <= _MOST:
                flag = name.replace("_", "-")
                raise CompressError(f"--{flag} is not in 0..{_MOST:g}", hint="0 switches its term off", usage=True)
        if self.penalty > _MOST:
            raise CompressError("--lam, --lr and --reg-scale make a penalty beyond fp32", hint="0.1, 0.03 and 1e-3", usage=True)
        if not (self.c1 or self.c2 or self.c3 or self.general_weight):
            raise CompressError("every term of the score is switched off", hint="leave --c2 at its default", usage=True)
        if not 0 <= self.damp <= 10:
            raise CompressError("--damp must be in 0..10", hint="0.01 is usual", usage=True)

    @property
    def penalty(self) -> float:
        """The factor of G g² in g'."""
        return self.penalty_at(self.lr)

    def penalty_at(self, lr: float) -> float:
        """The same at another rate."""
        return self.lam * 2 * lr**2 * self.reg_scale

    @property
    def survey_propagate(self) -> bool:
        """G is measured behind blocks that were pruned as SparseGPT does."""
        return True

    @property
    def propagate(self) -> bool:
        """Compensation and recovery see each block behind the pruned blocks before it."""
        return self.compensate or self.recover > 0


# -- step 1: what general text minds ---------------------------------------------------------------------------------------


def surveys(config: Config) -> bool:
    """Whether G is needed at all."""
    return config.penalty > 0 or config.general_weight > 0


def spool(config: Config, weights: int, linears: int) -> int:
    """Bytes that the walks keep on disk: G and the pruned 16-bit weights; scores; in training weights, gradients and sums."""
    each = (6 if surveys(config) else 0) + 4 + (12 if config.mode == "train" else 0)
    return each * weights + _sparsity.spool(config, weights, linears)


def survey_collects(block: Block, config: Config) -> Collect:
    """One Hessian per input."""
    return per_input(block, Stat.GRAM)


def survey(
    block: Block, stats: Mapping[str, InputStats], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """G (O, I) fp32 of every linear, and the weights as SparseGPT prunes them, for the blocks after this one."""
    kept: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for names, factor in _sparse_solver.factors(block, stats, config.damp):
        for name in names:
            W = block.weights[name].float()
            done = _sparse_solver.sparsify(W, factor, share=config.share, nm=config.nm, keep_saliency=True)
            assert done.saliency is not None
            kept[f"general:{name}"] = done.saliency
            seen[name] = done.W.to(dtype)
    return kept, seen


# -- step 2: what the domain's loss minds ----------------------------------------------------------------------------------


class Important:
    """`types.Reducer` and `types.Learner`: the score (O, I) of every linear, and how large each of its terms is."""

    def __init__(self, block: Block, config: Config, state: Mapping[str, torch.Tensor] | None = None) -> None:
        self._weights, self._survey, self._config = block.weights, block.survey, config
        state = state or {}
        known = {n: (state[f"sum:{n}"], state[f"terms:{n}"]) for n in block.weights if f"sum:{n}" in state}
        self._sum = {n: I.clone() for n, (I, _) in known.items()}  # I so far
        self._step: dict[str, torch.Tensor] = {}  # the gradients' sum in this step
        # sums over weights and steps of |g|, |penalty|, |g' W|, (g' W)², and how many steps
        self._terms = {n: terms for n, (_, terms) in known.items()}
        self._here: set[str] = set()  # linears that this sample has reached
        self._samples = 0

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        if name in self._here:  # the next sample begins
            self._here.clear()
            self._samples += 1
            if self._samples % self._config.batch == 0:
                self._finish(self._config.batch)
        self._here.add(name)
        g = dy.float().T @ x.float()
        self._step[name] = self._step[name].add_(g) if name in self._step else g
        if self._config.batch == 1:
            self._finish(1)

    def _finish(self, batch: int) -> None:
        """A step is over: its mean gradients go into I."""
        for name in list(self._step):
            self.learn(name, self._step.pop(name).div_(batch), self._config.lr)

    def learn(self, name: str, g: torch.Tensor, lr: float) -> torch.Tensor:
        """One step of a linear, whose mean gradient is g (O, I), at rate `lr`. Returns g', in g's place."""
        config, W = self._config, self._weights[name].float()
        factor, penalty = config.penalty_at(lr), torch.zeros((), device=g.device)
        terms = [g.abs().sum(dtype=torch.float64)]
        if factor:
            penalty = self._general(name, g.device).mul(g).mul_(g).mul_(factor)
            g.add_(penalty)
        t = g.float() * W
        square = t.square()
        terms += [s.sum(dtype=torch.float64) for s in (penalty.abs(), t.abs(), square)]
        I = t.mul_(config.c1).add_(square, alpha=config.c2)
        if config.c3:
            I.add_(W.pow(3), alpha=config.c3)
        I.abs_()
        self._sum[name] = self._sum[name].add_(I) if name in self._sum else I
        found = torch.stack([*terms, torch.ones_like(terms[0])])
        self._terms[name] = self._terms[name] + found if name in self._terms else found
        return g

    def state(self) -> dict[str, torch.Tensor]:
        """The sums so far."""
        return {**{f"sum:{n}": I for n, I in self._sum.items()}, **{f"terms:{n}": t for n, t in self._terms.items()}}

    def _general(self, name: str, device: torch.device) -> torch.Tensor:
        return self._survey[f"general:{name}"].to(device)

    def result(self) -> dict[str, torch.Tensor]:
        config = self._config
        if self._step:
            self._samples += 1
            self._finish((self._samples - 1) % config.batch + 1)
        out: dict[str, torch.Tensor] = {}
        for name, W in self._weights.items():
            score = self._sum.pop(name, None)
            sums = self._terms.get(name, torch.zeros(5, dtype=torch.float64))
            terms = sums[:4] / sums[4].clamp(min=1) / W.numel()
            out[f"terms:{name}"] = terms = torch.cat([terms.cpu(), W.float().abs().pow(3).mean(dtype=torch.float64).view(1).cpu()])
            if not float(terms[0]):  # no gradient: an expert that saw no token, or a loss that it does not reach
                out[f"unseen:{name}"] = torch.ones(1)
                score = self._general(name, W.device) if surveys(config) else W.float().square()
            elif config.general_weight:
                assert score is not None
                G = self._general(name, W.device)
                scale = float(score.mean(dtype=torch.float64)) / max(float(G.mean(dtype=torch.float64)), 1e-30)
                score = score.add_(G, alpha=config.general_weight * scale)
            assert score is not None
            if not torch.isfinite(score).all():
                raise CompressError(f"{name}: its importance overflows", hint="use smaller --c2, --c3 or --lam")
            out[f"score:{name}"] = score
            if config.scope == "model":
                out[f"{_sparsity.HISTOGRAM}{name}"] = _sparsity.histogram(score).cpu()
        return out


def reducer(block: Block, config: Config) -> Reducer | None:
    """What the reverse walk over the domain's text keeps of a block: its scores."""
    return Important(block, config)


def training(config: Config) -> Schedule | None:
    """How the model is trained on the domain's text meanwhile, in mode train."""
    return Schedule(config.epochs, config.batch, config.lr, config.warmup, config.clip) if config.mode == "train" else None


def learner(block: Block, config: Config, state: Mapping[str, torch.Tensor]) -> Learner:
    """The same, of the training: `block.weights` are those of the step, `state` the sums of the steps before."""
    return Important(block, config, state)


# -- step 3: what goes -----------------------------------------------------------------------------------------------------


def observes(config: Config) -> bool:
    """Compensation and recovery look at text once more."""
    return config.propagate


def collects(block: Block, config: Config) -> Collect:
    """One Hessian per input where there is compensation."""
    return survey_collects(block, config) if config.compensate else Collect()


def workspace(block: Block, config: Config) -> int:
    """Bytes that `compress` needs for its largest linear beside its scores; in the survey the Hessian's copies too."""
    return 4 * max(3 * W.shape[1] ** 2 + 7 * W.numel() for W in block.weights.values())


def keep_by_columns(score: torch.Tensor, share: float, width: int) -> torch.Tensor:
    """The mask (O, I) that prunes `share` of every block of `width` columns of the score (O, I); exact in total."""
    O, I = score.shape
    parts = []
    for start in range(0, I, width):
        part = score[:, start : start + width].contiguous()
        gone = zeros(share, O * (start + part.shape[1])) - zeros(share, O * start)
        parts.append(keep_highest(part.view(1, -1), gone).view(part.shape))
    return torch.cat(parts, 1)


def _mask(score: torch.Tensor, config: Config, params: Mapping[str, Any]) -> torch.Tensor:
    if config.blocking == "columns":
        return keep_by_columns(score, config.share, config.block_columns or max(1, score.shape[1] // BLOCKS))
    return _sparsity.select(score, config, params)


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Take the weights of least score out of every linear of the block."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    solved = _sparse_solver.factors(block, stats, config.damp) if stats else ((names, None) for names in readers(block))
    for names, factor in solved:
        for name in names:
            W = block.weights[name].float()
            mask = _mask(block.gradient[f"score:{name}"].to(W.device), config, block.params[name])
            W_hat = W * mask if factor is None else _sparse_solver.sparsify(W, factor, mask=mask).W
            packed[name], errors[name] = _sparsity.pack(W, W_hat, mask, config, scale_dtype, name)
    unseen = [n for n in packed if f"unseen:{n}" in block.gradient]
    record = {"terms": [_facts(block, n, config) for n in packed], **({"unseen": unseen} if unseen else {})}
    return Result(packed, errors=errors, record=record)


def _facts(block: Block, name: str, config: Config) -> dict[str, Any]:
    """Mean absolute value per weight and step of each term of I, and the penalty's size beside the gradient's."""
    gradient, penalty, first, second, third = block.gradient[f"terms:{name}"].tolist()
    values = {
        "gW": config.c1 * first, "gW2": config.c2 * second, "W3": config.c3 * third,
        "penalty": penalty / gradient if gradient else 0.0,
    }  # fmt: skip
    return {"linears": [name], **{key: float(f"{value:.6g}") for key, value in values.items()}}

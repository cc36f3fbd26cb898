"""SVD-LLM: truncation-aware whitening, the best low rank under the inputs' covariance (arXiv 2403.07378).

    minimise over rank(L) <= r   |(W - L) X|² = tr((W - L) C (W - L)ᵀ),     C = sum over tokens of x xᵀ

Source: AIoT-MLSys-Lab/SVD-LLM `SVDLLM.py`: S = Cholesky(C), W S = U Σ Vᵀ, L = U_r Σ_r V_rᵀ S⁻¹, r = floor(keep O I / (O + I)).
Here U comes from W C Wᵀ and L = U_r U_rᵀ W, which is the same L without the inverse. A C that is not positive definite is damped
step by step, and the manifest says how much. All statistics come from the dense model, as there.

`update` is the paper's second step (`whitening_local_update`): behind the factorized blocks before it each linear's B is the least
squares solution for the outputs of its dense weight, A stays. There from 16 windows, here from all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from compress.methods import _factorize, _lowrank
from compress.methods._factorize import workspace
from compress.methods._inputs import per_input
from compress.stats import InputStats
from compress.types import Block, Collect, Result, Runner, Stat

VERB = "factorize"
CALIBRATED = True
__all__ = ["CALIBRATED", "VERB", "Config", "collects", "compress", "survey", "survey_collects", "surveys", "workspace"]


@dataclass(frozen=True, slots=True)
class Config(_factorize.Factorize):
    """Options of SVD-LLM."""

    update: bool = field(default=False, metadata={"help": "the second step: refit B behind the factorized blocks"})
    damp: float = field(default=0.0, metadata={"help": "share of the mean diagonal added to the covariance"})

    @property
    def propagate(self) -> bool:
        """The second step and recovery see each block behind the factorized ones."""
        return self.update or self.recover > 0


def collects(block: Block, config: Config) -> Collect:
    """One second moment per input."""
    return per_input(block, Stat.GRAM)


survey_collects = collects


def surveys(config: Config) -> bool:
    """A of the second step is the dense model's."""
    return config.update


def survey(
    block: Block, stats: Mapping[str, InputStats], config: Config, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A (r, I) of every linear, fp32, from the dense model's covariance; later blocks see dense weights."""
    kept = {}
    for name, weight in block.weights.items():
        C = _lowrank.moment(stats[name].hessian(), config.damp, name)
        start = torch.empty(0, dtype=torch.int64, device=weight.device)
        kept[f"inputs:{name}"] = _lowrank.Problem(weight, C).fit(start, int(block.params[name]["rank"])).A.float()
    return kept, {}


def compress(
    block: Block, stats: Mapping[str, InputStats], config: Config, run: Runner | None, scale_dtype: torch.dtype
) -> Result:  # fmt: skip
    """Factorize every linear of the block."""

    def moments(name: str) -> _lowrank.Moment:
        return _lowrank.moment(stats[name].hessian(), config.damp, name)

    def outputs(name: str, found: _lowrank.Factors) -> _lowrank.Factors:
        A = block.survey[f"inputs:{name}"].to(found.A)
        return _lowrank.for_outputs(block.weights[name], moments(name), A)

    return _factorize.plain_rank(block, moments, config, scale_dtype, outputs if config.update else None)

"""What the factorizing methods share: options, one rank for a share of the parameters, and from factors to a packed linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError
from compress.formats import lowrank_sparse
from compress.methods import _lowrank, _solvers
from compress.methods._budget import rank_of
from compress.methods._inputs import readers
from compress.methods._pack import relative_error
from compress.methods._quantizer import Grid
from compress.types import Block, Packed, Result

DAMP = 0.01  # of the Hessians that quantize factors


@dataclass(frozen=True, slots=True)
class Factorize:
    """Options of every factorizing method."""

    keep: float | None = field(default=None, metadata={"help": "share of the linears' parameters that is kept; needed"})
    recover: int = field(default=0, metadata={"help": "epochs of training each block towards the dense one"})
    recover_lr: float = field(default=0.005, metadata={"help": "its step, as a share of the factors' root mean square"})
    then_bits: int = field(default=16, metadata={"help": "bits per value of the factors: 16, or 8, 4, 3, 2 by GPTQ"})
    then_group_size: int = field(default=64, metadata={"help": "values that share a scale with --then-bits"})

    def __post_init__(self) -> None:
        if self.keep is None:
            raise CompressError("how much shall stay?", hint="--keep 0.8 keeps four fifths of the linears' parameters", usage=True)
        if not 0 < self.keep <= 1:
            raise CompressError(f"--keep {self.keep} is not in 0..1", hint="0.8 keeps four fifths", usage=True)
        if self.recover < 0 or not 0 < self.recover_lr < 1:
            raise CompressError("--recover is a number of epochs, --recover-lr lies in 0..1", hint="10 and 0.005", usage=True)
        if self.recover and not getattr(self, "propagate", True):
            raise CompressError("--recover trains behind factorized blocks", hint="add --propagate", usage=True)
        if self.then_bits not in (2, 3, 4, 8, 16):
            raise CompressError(f"--then-bits {self.then_bits} is not supported", hint="use 8 or 4", usage=True)
        if self.then_group_size < 1:
            raise CompressError(f"--then-group-size {self.then_group_size} is not a group", hint="such as 64", usage=True)

    @property
    def kind(self) -> str:
        """Kind of the linears."""
        return lowrank_sparse.KIND

    def budget(self, shape: tuple[int, int]) -> int:
        """Parameters of one linear (O, I) that keeps the share itself."""
        assert self.keep is not None
        return math.floor(self.keep * shape[0] * shape[1] + 1e-6)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a linear (O, I) of which the share leaves nothing."""
        if rank_of(self.budget(shape), 0, shape) < 1:
            least = (shape[0] + shape[1]) / (shape[0] * shape[1])
            raise CompressError(
                f"{name}: --keep {self.keep} leaves {shape[0]} x {shape[1]} no rank",
                hint=f"--keep {math.ceil(1000 * least) / 1000} or more, or --ignore 're:.*{name.rsplit('.', 1)[-1]}'", usage=True,
            )  # fmt: skip

    def params(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Format parameters of a linear (O, I)."""
        return {"rank": rank_of(self.budget(shape), 0, shape), "columns": 0, **self.stored}

    @property
    def stored(self) -> dict[str, Any]:
        """Format parameters that say how values are stored."""
        if self.then_bits == 16:
            return {}
        return {"value_bits": self.then_bits, "value_group": self.then_group_size}


def workspace(block: Block, config: Factorize) -> int:
    """Bytes that `compress` needs for its largest linear: fp64 copies of the second moment, of the weight, and an eigenproblem."""
    return 8 * max(2 * W.shape[1] ** 2 + 6 * W.numel() + 6 * min(W.shape) ** 2 for W in block.weights.values())


def finish(
    W: torch.Tensor, problem: _lowrank.Problem, found: _lowrank.Factors, config: Factorize, params: Mapping[str, Any],
    dtype: torch.dtype, name: str,
) -> tuple[Packed, float]:  # fmt: skip
    """Factors of W (O, I) as the artifact holds them, and the relative distance of what they make from W."""
    compact = bool(params.get("compact", True))
    A = found.A if compact else found.whole()
    if config.then_bits == 16:
        parts = [t.to(dtype).cpu() for t in (found.B, A, found.R)]
        if not all(bool(torch.isfinite(t).all()) for t in parts):
            raise CompressError(f"{name}: a factor does not fit into {dtype}", hint="start from a bfloat16 copy of the checkpoint")
        packed = lowrank_sparse.pack(parts[0], parts[1], found.columns.cpu(), parts[2], W.shape[1])
    else:
        packed = _quantized(problem, found, A, config, compact, dtype, name)
    return packed, relative_error(W.float(), lowrank_sparse.dequantize(packed))


def _quantized(
    problem: _lowrank.Problem, found: _lowrank.Factors, A: torch.Tensor, config: Factorize, compact: bool, dtype: torch.dtype,
    name: str,
) -> Packed:  # fmt: skip
    """A by GPTQ on what it sees, then the best U = [B | R] for that A, by GPTQ on [A x ; x_I]."""
    C, I = problem.C, found.columns
    inputs = problem.shape[1]
    J = _lowrank.others(I, inputs) if compact else torch.arange(inputs, device=I.device)
    left = None
    S = torch.zeros(found.rank + len(I), inputs, dtype=torch.float64, device=I.device)  # [A x ; x_I] = S x
    S[found.rank :, I] = torch.eye(len(I), dtype=torch.float64, device=I.device)
    if found.rank:
        q, scale, values = _round(A, C.inner(J), config, dtype, name)
        left = (q, scale)
        S[: found.rank, J] = values
    seen = C.after(S)
    H = seen @ S.T
    H = (H + H.T) / 2
    U = torch.cat([found.B, found.R], 1)
    if found.rank:
        H.diagonal().add_(1e-9 * float(H.diagonal().mean()))
        L, failed = torch.linalg.cholesky_ex(H)
        U = torch.cholesky_solve((problem.W @ seen.T).T, L).T if not int(failed) else U
    q, scale, _ = _round(U, H, config, dtype, name)
    return lowrank_sparse.pack_codes(
        left, (q, scale), I.cpu(), inputs, bits=config.then_bits, group=config.then_group_size, rank=found.rank, compact=compact
    )


def _round(
    X: torch.Tensor, H: torch.Tensor, config: Factorize, dtype: torch.dtype, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (R, K) uint8 and scales (R, G) of X (R, L) padded to whole groups, on the CPU, and the values (R, L) that they make."""
    group, length = config.then_group_size, X.shape[1]
    more = -length % group
    W = torch.nn.functional.pad(X.float(), (0, more))
    H = torch.nn.functional.pad(H.float(), (0, more, 0, more))  # inputs that are always 0
    grid = Grid(config.then_bits, group, True, dtype)
    solved, _ = _solvers.second_order(W, H, grid, damp=DAMP, act_order="group", clip="hessian", name=name)
    q = solved.q.cpu()
    q[:, length:] = 1 << (config.then_bits - 1)
    return q, solved.scale.to(dtype).cpu(), _solvers.dequantize(solved)[:, :length].double()


def plain_rank(
    block: Block, moments: Callable[[str], _lowrank.Moment], config: Factorize, dtype: torch.dtype,
    outputs: Callable[[str, _lowrank.Factors], _lowrank.Factors] | None = None,
) -> Result:  # fmt: skip
    """Every linear as two factors of the rank that its share affords, best under `moments` of its inputs; no columns.

    `outputs` may change the factors of a linear after that.
    """
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    record: list[dict[str, Any]] = []
    for names in readers(block):
        C = moments(names[0])
        for name in names:
            W, params = block.weights[name], block.params[name]
            problem = _lowrank.Problem(W, C)
            found = problem.fit(torch.empty(0, dtype=torch.int64, device=W.device), int(params["rank"]))
            found = found if outputs is None else outputs(name, found)
            packed[name], errors[name] = finish(W, problem, found, config, params, dtype, name)
            facts = {"rank": found.rank, "columns": 0, "loss": float(f"{found.error:.6g}"), "damp": float(f"{C.damp:.6g}")}
            record.append({"linear": name, **facts})
    return Result(packed, errors=errors, record={"factors": record})

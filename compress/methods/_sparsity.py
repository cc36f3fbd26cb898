"""What the pruning methods share: how much goes and where it is counted, and from a mask to a packed linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import CompressError, nearest
from compress.formats import bitmask, sparse24
from compress.methods._masks import keep_highest, keep_n_of_m, parse_pattern, zeros
from compress.methods._pack import relative_error
from compress.types import Block, Packed, Result

Score = Callable[[str, torch.Tensor], torch.Tensor]  # (linear, its weight (O, I) fp32) -> scores (O, I)
HISTOGRAM = "histogram:"  # prefix of what a survey keeps
SCOPES = ("row", "matrix", "model")
QUALITY_EPOCHS = 20
BINS = 1 << 16  # of scores, by the upper 16 bits of their fp32 form: 1/128 of a score at most


@dataclass(frozen=True, slots=True)
class Sparse:
    """Options of every pruning method."""

    sparsity: float | None = field(default=None, metadata={"help": "share of zeros in the linears; default 0.5"})
    pattern: str = field(default="", metadata={"help": "N:M, N weights kept of every M inputs, such as 2:4, in place of a share"})
    recover: int = field(default=0, metadata={"help": "epochs of training each block towards the dense one; masks stay"})
    quality: bool = field(default=False, metadata={"help": "best mode: behind pruned blocks, stage by stage, recovery"})
    recover_lr: float = field(default=0.02, metadata={"help": "its step, as a share of the weights' root mean square"})

    def __post_init__(self) -> None:
        if self.quality:
            best = {"recover": self.recover or self.quality_epochs, "propagate": True, "sequential": True}
            for name, value in best.items():
                if name in {f.name for f in dataclasses.fields(self)}:
                    object.__setattr__(self, name, value)
        if self.recover < 0 or not 0 < self.recover_lr < 1:
            raise CompressError("--recover is a number of epochs, --recover-lr lies in 0..1", hint="10 and 0.02", usage=True)
        if self.recover and not getattr(self, "propagate", True):
            raise CompressError("--recover trains behind pruned blocks", hint="add --propagate", usage=True)
        if self.pattern:
            parse_pattern(self.pattern)
            if self.sparsity is not None:
                raise CompressError("--pattern has a sparsity of its own", hint="drop --sparsity", usage=True)
        if not 0 <= self.share <= 1:
            raise CompressError(f"--sparsity {self.sparsity} is not in 0..1", hint="0.5 prunes half of the weights", usage=True)

    @property
    def quality_epochs(self) -> int:
        """Epochs of recovery that `quality` turns on."""
        return QUALITY_EPOCHS

    @property
    def share(self) -> float:
        """The share of zeros."""
        if self.pattern:
            n, m = parse_pattern(self.pattern)
            return 1 - n / m
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def nm(self) -> tuple[int, int] | None:
        """(N, M) of the pattern; None where unstructured."""
        return parse_pattern(self.pattern) if self.pattern else None

    @property
    def kind(self) -> str:
        """Kind of the linears."""
        return sparse24.KIND if self.pattern else bitmask.KIND

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a linear (O, I) that the pattern does not divide."""
        if self.nm is not None and shape[1] % self.nm[1]:
            raise CompressError(
                f"{name}: {shape[1]} inputs cannot be split into groups of {self.nm[1]} (--pattern {self.pattern})",
                hint=f"use another pattern, or --ignore 're:.*{name.rsplit('.', 1)[-1]}'", usage=True,
            )  # fmt: skip

    def params(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Format parameters of a linear (O, I)."""
        if self.nm is not None:
            return {"n": self.nm[0], "m": self.nm[1]}
        O, I = shape
        per_row = getattr(self, "scope", "matrix") == "row"
        return {"nnz": O * (I - zeros(self.share, I)) if per_row else O * I - zeros(self.share, O * I)}


def check_scope(scope: str, pattern: str, known: tuple[str, ...] = SCOPES) -> None:
    """Refuse a scope that a method does not have."""
    if scope not in known:
        raise CompressError(f"--scope {scope!r} is unknown", hint=nearest(scope, list(known)), usage=True)
    if scope == "model" and pattern:
        raise CompressError("--scope model chooses counts, a pattern fixes them", hint="drop --pattern or --scope", usage=True)


def select(score: torch.Tensor, config: Any, params: Mapping[str, Any]) -> torch.Tensor:
    """The mask (O, I) that keeps the highest scores (O, I): by pattern, per row, or `nnz` of the whole matrix."""
    if config.nm is not None:
        return keep_n_of_m(score, *config.nm)
    if config.scope == "row":
        return keep_highest(score, zeros(config.share, score.shape[1]))
    return keep_highest(score.reshape(1, -1), score.numel() - int(params["nnz"])).view(score.shape)


def pack(
    W: torch.Tensor, W_hat: torch.Tensor, mask: torch.Tensor, config: Sparse, dtype: torch.dtype, name: str
) -> tuple[Packed, float]:  # fmt: skip
    """W_hat (O, I), 0 outside of the mask, packed with values of `dtype`; and its relative distance from W (O, I)."""
    values = W_hat.to(dtype).cpu()
    if not torch.isfinite(values).all():
        raise CompressError(f"{name}: a weight does not fit into {dtype}", hint="start from a bfloat16 copy of the checkpoint")
    kept = mask.cpu()
    nm = config.nm
    packed = bitmask.pack(values, kept) if nm is None else sparse24.pack(values, kept, n=nm[0], m=nm[1])
    return packed, relative_error(W.float(), W_hat.to(dtype).float())


def histogram(score: torch.Tensor) -> torch.Tensor:
    """Counts (BINS,) of non-negative scores by the upper 16 bits of their fp32 form, which orders them."""
    return (score.float().contiguous().view(-1).view(torch.int32) >> 16).bincount(minlength=BINS)


def share_out(blocks: list[dict[str, torch.Tensor]], share: float) -> list[dict[str, dict[str, int]]]:
    """How many weights each linear keeps when one threshold prunes `share` of all; exact in total.

    `blocks` holds the linears' histograms. The threshold is a bin; of the weights in that bin every linear loses the same share.
    """
    total = sum((h for block in blocks for h in block.values()), torch.zeros(BINS, dtype=torch.int64))
    gone = zeros(share, int(total.sum()))
    running = total.cumsum(0)
    limit = int((running < gone).sum())
    below = int(running[limit - 1]) if limit else 0
    inside, out, seen, given = int(total[limit]) if limit < BINS else 0, [], 0, 0
    for block in blocks:
        found = {}
        for name, h in block.items():
            seen += int(h[limit]) if limit < BINS else 0
            due = (gone - below) * seen // inside if inside else 0
            lost = int(h[:limit].sum()) + due - given
            given = due
            found[name] = {"nnz": int(h.sum()) - lost}
        out.append(found)
    return out


def surveys(config: Any) -> bool:
    """One threshold for the model needs the histogram of all scores first; they are the dense model's."""
    return bool(config.scope == "model")


def spool(config: Any, weights: int, linears: int) -> int:
    """Bytes that this survey keeps on disk."""
    return 8 * BINS * linears if surveys(config) else 0


def histograms(block: Block, score: Score) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What such a survey keeps of a block: its scores' histograms; later blocks see dense ones."""
    return {f"{HISTOGRAM}{n}": histogram(score(n, W.float())) for n, W in block.weights.items()}, {}


def settle(results: Callable[[], Iterator[Mapping[str, torch.Tensor]]], config: Any) -> list[dict[str, dict[str, int]]]:
    """How many weights each linear keeps, from the histograms kept; nothing where counts are not the model's."""
    if not surveys(config):
        return []
    kept = [{n.removeprefix(HISTOGRAM): h for n, h in found.items() if n.startswith(HISTOGRAM)} for found in results()]
    return share_out(kept, config.share)


def masked(
    block: Block, score: Score, config: Any, dtype: torch.dtype,
    note: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
) -> Result:  # fmt: skip
    """Every linear of the block without its weights of least score; what stays is unchanged. `note` sees (name, scores, mask)."""
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    for name, weight in block.weights.items():
        W = weight.float()
        found = score(name, W)
        mask = select(found, config, block.params[name])
        packed[name], errors[name] = pack(W, W * mask, mask, config, dtype, name)
        if note is not None:
            note(name, found, mask)
    return Result(packed, errors=errors)


def check_walk(sequential: bool, propagate: bool) -> None:
    """Refuse stages that see dense blocks."""
    if sequential and not propagate:
        raise CompressError("--sequential needs pruned blocks to go on from", hint="drop --no-propagate", usage=True)

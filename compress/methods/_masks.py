"""Which weights go: exact counts, one tie rule, and the normalisation that NoWag-P and ARMOR score with.

A mask is (O, I) bool, True = kept. N:M keeps N of every M consecutive inputs; `sparsity` is the fraction of zeros. A group of n
weights loses exactly `zeros(sparsity, n)` of them, those of least score; of equal scores the first ones go (Wanda's stable sort).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from compress.errors import CompressError

_PAIRWISE = 8  # largest M ranked by comparing all pairs, which is faster than sorting so many tiny rows
EPS = 1e-5  # added to the norms (LawrenceRLiu/ARMOR `src/utils/normalizer.py`)


def zeros(sparsity: float, count: int) -> int:
    """How many of `count` weights go: floor(sparsity * count), binary rounding forgiven."""
    return math.floor(sparsity * count + 1e-6)


def parse_pattern(text: str) -> tuple[int, int]:
    """(N, M) of "N:M": N kept of every M consecutive inputs."""
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text.strip(), re.ASCII)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m <= 64:
        raise CompressError(
            f"--pattern {text!r} is not N:M, N weights kept of every M", hint="such as 2:4; M is at most 64", usage=True
        )  # fmt: skip
    return n, m


def keep_n_of_m(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """(O, I) bool with exactly n True in every m columns: the largest scores (O, I) of each group."""
    O, I = score.shape
    groups = score.reshape(O, I // m, m)
    if m > _PAIRWISE:
        kept = torch.ones_like(groups, dtype=torch.bool)
        kept.scatter_(2, groups.argsort(dim=2, stable=True)[..., : m - n], False)
        return kept.view(O, I)
    rank = torch.zeros(groups.shape, dtype=torch.uint8, device=score.device)  # how many of the group go before
    for i in range(m):
        for j in range(i):
            first = groups[..., j] <= groups[..., i]
            rank[..., i] += first
            rank[..., j] += ~first
    return (rank >= m - n).view(O, I)


def keep_highest(score: torch.Tensor, gone: int) -> torch.Tensor:
    """(R, L) bool: all but the `gone` least scores of each row of (R, L), exactly."""
    R, L = score.shape
    if gone == 0:
        return torch.ones(R, L, dtype=torch.bool, device=score.device)
    if gone == L:
        return torch.zeros(R, L, dtype=torch.bool, device=score.device)
    limit = score.kthvalue(gone, dim=1, keepdim=True).values
    below, equal = score < limit, score == limit
    ties = gone - below.sum(1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(1) <= ties)))


@dataclass(frozen=True, slots=True)
class Normalised:
    """W = diag(r2) W_bar diag(r1)."""

    W: torch.Tensor  # W_bar (O, I), fp32
    r1: torch.Tensor  # (I,) norms of the columns
    r2: torch.Tensor  # (O,) norms of the rows of what is left


def normalise(W: torch.Tensor) -> Normalised:
    """Columns divided by their norms, then rows by theirs; W (O, I) (NoWag, arXiv 2504.14569; ARMOR `normalizer.py`)."""
    W = W.float()
    r1 = torch.linalg.vector_norm(W, dim=0) + EPS
    W = W / r1
    r2 = torch.linalg.vector_norm(W, dim=1) + EPS
    return Normalised(W / r2.unsqueeze(1), r1, r2)

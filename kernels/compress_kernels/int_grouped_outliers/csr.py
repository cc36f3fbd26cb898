"""The outliers' own product on a CPU: y = S x for a CSR matrix S (O, I), by `embedding_bag`, whose bags are S's rows.

torch's CPU kernel for it (FBGEMM) takes int32 indices, and `torch.compile` sees through it; torch's sparse CSR tensors
need MKL, warn about their beta state, and are faster for a single token only (measured, kernels/README.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Outliers(NamedTuple):
    """A CSR matrix as this path wants it: 8 bytes per outlier."""

    indptr: torch.Tensor  # (O+1,) int32
    index: torch.Tensor  # (nnz,) int32
    value: torch.Tensor  # (nnz,) fp32


def prepare(indptr: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> Outliers:
    """Widen an artifact's outliers once."""
    return Outliers(indptr, index.to(torch.int32), value.float())


def product(x: torch.Tensor, s: Outliers) -> torch.Tensor:
    """x (T, I) times Sᵀ -> (T, O) fp32."""
    columns = x.T.float().contiguous()
    if x.shape[0] == 1:  # the kernel is slow with rows of one
        columns = columns.expand(-1, 2).contiguous()
    y = F.embedding_bag(s.index, columns, s.indptr, mode="sum", per_sample_weights=s.value, include_last_offset=True)
    return y[:, : x.shape[0]].T

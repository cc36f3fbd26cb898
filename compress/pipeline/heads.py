"""Embedding and head rounded to integers (`--lm-head-bits`), whatever the method did to the blocks.

Rounded to nearest by the common quantizer, at 4 bits each group's range shrunk to the least error, in pieces of whole rows: a table
may be larger than a block. Tied ones are one tensor, read by both. The rounding follows a rotation, as it is read through the view.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from compress import registry
from compress.checkpoint import dtypes
from compress.checkpoint.writer import CheckpointWriter
from compress.errors import CompressError
from compress.methods._pack import quantize
from compress.methods._quantizer import Grid
from compress.models.view import CheckpointView
from compress.pipeline.layout import DENSE, Target, dense
from compress.types import Packed

_PIECE = 1 << 21  # weights that are rounded together
_ROWS = 32  # a piece begins at a multiple: there zero-points of any width begin a word


def grid_of(target: Target) -> Grid:
    """The grid of a head's weight; scales are stored in the checkpoint's dtype. At 8 bits a clip gains nothing (docs/log.md)."""
    bits, scale = int(target.params["bits"]), dtypes.TORCH[target.dtype]
    return Grid(bits, target.params["group_size"], target.params["symmetric"], scale, mse_clip=bits < 8)


def seconds(targets: Iterable[Target]) -> float:
    """About how long the rounding takes, for `--dry-run`: 80 ranges are tried at 4 bits."""
    return sum(t.shape[0] * t.shape[1] * (7e-7 if t.params["bits"] < 8 else 2e-8) for t in targets)


def write(view: CheckpointView, writer: CheckpointWriter, target: Target, device: str) -> dict[str, Any]:
    """Round the weight (O, I) of `target` and write it, piece by piece; returns its entry for the manifest."""
    (O, I), grid = target.shape, grid_of(target)
    rows = max(_ROWS, _PIECE // I // _ROWS * _ROWS)
    error = norm = 0.0
    for start in range(0, O, rows):
        W = view.read_slice(f"{target.name}.weight", start, min(start + rows, O)).to(device).float()
        packed, _ = quantize(W, grid)
        W_hat = dense(packed)
        error += float((W_hat.to(W.device) - W).square().sum(dtype=torch.float64))
        norm += float(W.square().sum(dtype=torch.float64))
        for name, (at, piece) in _pieces(target, packed, W_hat, start).items():
            if not dtypes.finite(piece):
                raise CompressError(f"{name}: the result holds NaN or Inf", hint="leave out --lm-head-bits")
            writer.write_piece(name, at, piece)
    stored = [p for p in writer.plan.values() if p.name.rpartition(".")[0] == target.name and not p.name.endswith(".bias")]
    bits = 8 * sum(p.nbytes for p in stored) / (O * I)
    return {
        "kind": target.kind, "version": registry.by_kind(target.kind).VERSION, "params": dict(target.params), "shape": [O, I],
        "bits": float(f"{bits:.6g}"), "error": float(f"{(error / norm) ** 0.5 if norm else 0.0:.6g}"),
    }  # fmt: skip


def _pieces(target: Target, packed: Packed, W_hat: torch.Tensor, start: int) -> dict[str, tuple[int, torch.Tensor]]:
    """Full name -> (first element, elements) of what the rows from `start` on become."""
    if target.kind == DENSE:
        return {f"{target.name}.weight": (start * target.shape[1], W_hat.to(dtypes.TORCH[target.dtype]))}
    out: dict[str, tuple[int, torch.Tensor]] = {}
    for suffix, tensor in packed.tensors.items():
        if suffix == "weight_shape":
            out[f"{target.name}.{suffix}"] = 0, torch.tensor(target.shape, dtype=torch.int64)
        else:
            line = start * int(target.params["bits"]) // 32 if suffix == "weight_zero_point" else start
            out[f"{target.name}.{suffix}"] = line * tensor.shape[1], tensor
    return out

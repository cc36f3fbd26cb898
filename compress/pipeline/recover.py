"""Recovery: train what a block has left until its outputs are again those of the dense block on dense inputs.

    minimise over the stored values   mean over tokens of |f(W_hat; x_hat) - f(W; x)|² / |f(W; x)|²

x_hat are the block's inputs behind the compressed blocks before it, x those of the dense model, so that earlier errors are undone
too (after EBFT, arXiv 2402.12419, and ZipLM's local distillation; masks stay). Adam with a cosine schedule, one step per batch of
calibration windows, steps relative to each tensor's own size. Every eighth batch is held out; the epoch that is best there is kept,
the start included, so a block never ends worse than it began on text that it was not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.errors import CompressError
from compress.pipeline.states import Store
from compress.types import Trainable

_HELD = 8  # every so many batches one is held out
Run = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recovery:
    """One block: how it runs with the weights (O, I) of its linears, what it sees, and what it shall give."""

    run: Run  # (weights by linear, inputs (B, T, D)) -> outputs (B, T, D)
    inputs: Store
    targets: Store
    device: str

    def train(
        self, linears: Mapping[str, Trainable], epochs: int, lr: float, seed: int
    ) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """The best parts of every linear, and the losses for the manifest. `lr` is a share of each part's root mean square."""
        parts = {n: {k: t.to(self.device, torch.float32, copy=True) for k, t in one.parts.items()} for n, one in linears.items()}
        groups = []
        for n, one in parts.items():
            for k, t in one.items():
                step = lr * linears[n].steps.get(k, 1.0) * float(t.square().mean().sqrt().clamp(min=1e-8))
                groups += [{"params": [t.requires_grad_()], "lr": step}] if step else []
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
        held = [b for b in range(len(self.inputs)) if b % _HELD == _HELD - 1]
        used = [b for b in range(len(self.inputs)) if b not in held]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(1, epochs * len(used))))
        )
        judged = held or used
        first = best = self._loss(linears, parts, judged)
        kept = _copy(parts)
        order = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for i in torch.randperm(len(used), generator=order).tolist():
                optimiser.zero_grad()
                with torch.enable_grad():
                    self._error(linears, parts, used[i]).backward()
                optimiser.step()
                schedule.step()
            loss = self._loss(linears, parts, judged)
            if loss < best:
                best, kept = loss, _copy(parts)
        return kept, {"before": float(f"{first:.6g}"), "after": float(f"{best:.6g}")}

    def _error(self, linears: Mapping[str, Trainable], parts: dict[str, Tensors], batch: int) -> torch.Tensor:
        weights = {n: one.weight(parts[n]) for n, one in linears.items()}
        want = self.targets[batch].to(self.device, torch.float32)
        out = self.run(weights, self.inputs[batch].to(self.device))
        size = want.square().mean(-1)
        error = ((out.float() - want).square().mean(-1) / (size + 1e-3 * size.median()).clamp(min=1e-30)).mean()
        if not torch.isfinite(error.detach()):
            raise CompressError("recovery: the loss is NaN or Inf", hint="a smaller --recover-lr")
        return error

    @torch.no_grad()
    def _loss(self, linears: Mapping[str, Trainable], parts: dict[str, Tensors], batches: list[int]) -> float:
        return sum(float(self._error(linears, parts, b)) for b in batches) / len(batches)


def _copy(parts: dict[str, Tensors]) -> dict[str, Tensors]:
    return {n: {k: t.detach().clone() for k, t in one.items()} for n, one in parts.items()}

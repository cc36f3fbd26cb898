"""The end of the model: mean next-token cross entropy and its gradient, the vocabulary in pieces.

    L_n = mean over t < T - 1 of  -log softmax(f(W h_t + b))[token_{t+1}],     f: identity, or c tanh(./c) (Gemma 2)

Two passes over W (V, D), one piece of rows at a time: first the log-sum-exp and the targets' logits, then dL/dh. Memory is one
piece of W and one piece of logits, whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from compress.errors import CompressError
from compress.models.skeleton import Skeleton
from compress.models.view import CheckpointView

_ROWS = 8192  # of the vocabulary at a time
_TOKENS = 2048


class Head:
    """Loss and gradient at the last block's output."""

    def __init__(self, skeleton: Skeleton, view: CheckpointView, dtype: torch.dtype) -> None:
        self.skeleton, self.view, self.dtype = skeleton, view, dtype
        config, model = skeleton.config.get_text_config(), skeleton.model
        for name in ("logit_scale", "logits_scaling"):
            if hasattr(config, name):
                raise CompressError(
                    f"model family {config.model_type!r} scales its logits ({name}), which gradient methods do not know",
                    hint="use a method without gradients, such as awq, gptq or rsq; of lost --importance relative",
                )
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        module, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {id(m): n for n, m in model.named_modules()}
        name = names[id(module)]
        self.weight = f"{name}.weight" if f"{name}.weight" in view.names else f"{names[id(embedding)]}.weight"
        self.bias = f"{name}.bias" if f"{name}.bias" in view.names else None

    def _pieces(self, device: torch.device) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """(first row, rows of W, their bias)."""
        V = self.view.shape(self.weight)[0]
        bias = self.view.read(self.bias).to(device, self.dtype) if self.bias else None
        for start in range(0, V, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, V))
            W = self.view.read_rows(self.weight, rows).to(device, self.dtype)
            yield start, W, None if bias is None else bias[start : start + len(rows)]

    def _logits(self, h: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        z = torch.nn.functional.linear(h, W, bias)
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap

    def gradient(self, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(L (B,), dL/dhidden (B, T, D)) for the last block's output `hidden` (B, T, D) and tokens (B, T)."""
        with torch.enable_grad():
            x = hidden.detach().requires_grad_()
            h = self.skeleton.finish(self.view, x, self.dtype)
        B, T, D = h.shape
        flat = h.detach()[:, :-1].reshape(-1, D)
        target = tokens[:, 1:].reshape(-1).to(flat.device)
        top = torch.full((len(flat),), -torch.inf, dtype=flat.dtype, device=flat.device)
        total, hit = torch.zeros_like(top), torch.zeros_like(top)
        pieces = [slice(i, i + _TOKENS) for i in range(0, len(flat), _TOKENS)]
        for start, W, bias in self._pieces(flat.device):
            for p in pieces:
                z = self._logits(flat[p], W, bias)
                most = torch.maximum(top[p], z.amax(1))
                total[p] = total[p] * (top[p] - most).exp() + (z - most[:, None]).exp().sum(1)
                top[p] = most
                here = (target[p] >= start) & (target[p] < start + len(W))
                column = (target[p] - start).clamp(0, len(W) - 1)
                hit[p] = torch.where(here, z.gather(1, column[:, None])[:, 0], hit[p])
        logsum = top + total.log()
        grad = torch.zeros_like(flat)
        for start, W, bias in self._pieces(flat.device):
            for p in pieces:
                z = self._logits(flat[p], W, bias)
                dz = (z - logsum[p, None]).exp()
                here = ((target[p] >= start) & (target[p] < start + len(W))).nonzero()[:, 0]
                dz[here, target[p][here] - start] -= 1
                if self.cap is not None:
                    dz *= 1 - (z / self.cap).square()
                grad[p] += dz @ W
        full = torch.zeros_like(h)
        full[:, :-1] = grad.view(B, T - 1, D) / (T - 1)
        loss = (logsum - hit).view(B, T - 1).mean(1)
        return loss, torch.autograd.grad(h, x, full)[0]

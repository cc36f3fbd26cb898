"""A checkpoint view that rotates on read: the same function, in a basis where outliers are spread over the channels.

    R1  residual stream, Q (D, D):         embedding E Q;  readers W diag(gamma) Q;  writers Qᵀ W, Qᵀ b;  head W diag(gamma_f) Q
        (a vision-language model's projector is a writer: its outputs take the place of embeddings)
    R2  values, H (head_dim, head_dim):    v rows Hᵀ W_v, Hᵀ b_v per KV head;  o columns W_o H per query head

Source: QuaRot (arXiv 2404.00456; spcl/QuaRot and ylsung/rsq `rotation_utils.py`), R2 per head as SpinQuant (arXiv 2405.16406), all
folded into the weights in fp64. Two differences from the official code, both because it changes the model there: tied heads are
untied (the head absorbs the final norm, the embedding must not), and RMSNorm models keep the mean of their embeddings. Norms
become 1.
Gemma 2 and 3 have norms between a writer and the stream: R2 only. Families with LayerNorm are refused.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import unpacked
from compress.checkpoint.dtypes import itemsize
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.models import families
from compress.models.families import heads
from compress.models.hadamard import Rotation
from compress.models.skeleton import Skeleton
from compress.models.view import CheckpointView
from compress.types import Rotate, Scaling, Sparsity

logger = logging.getLogger(__name__)
_PIECE = 1 << 20  # elements of a large tensor at a time
Step = Callable[[torch.Tensor], torch.Tensor]


def check(config: Any) -> bool:
    """Whether R1 applies to a model (else R2 only); refuses families that cannot be rotated."""
    family = families.find(config)
    if family is not None and family.rotates == "residual" and family.images is None:
        raise CompressError(
            f"model family {config.model_type!r} cannot be rotated: what makes its image embeddings is not known",
            hint="use --no-rotate",
        )
    if family is None or not family.rotates:
        raise CompressError(
            f"model family {config.model_type!r} cannot be rotated"
            + (" (LayerNorm, which does not commute with a rotation)" if family else ""),
            hint="use --no-rotate",
        )
    return family.rotates == "residual"


def untie(config: Any) -> bool:
    """Give a tied model a head of its own where R1 asks for it; whether that changed anything."""
    if not check(config) or not getattr(config, "tie_word_embeddings", False):
        return False
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return True


def open_model(
    folder: Path, config: Any, rotation: Rotate | None, trust_remote_code: bool = False, keep_zeros: bool = False,
    known: Mapping[str, Any] | None = None,
) -> tuple[Skeleton, CheckpointView]:  # fmt: skip
    """A checkpoint's skeleton and its view, rotated where asked; `config` loses its tied head then.

    With the manifest `known` (`unpacked.read`) an artifact's linears are read as dense weights; `keep_zeros` holds every linear's
    zeros to be meant as a pruned one's are.
    """
    if rotation is None:
        skeleton = Skeleton(config, trust_remote_code)
        reader = CheckpointReader(folder) if known is None else unpacked.UnpackedReader(folder, known, skeleton.conv1d_weights)
        view = CheckpointView(reader, skeleton)
        view.sparsity = unpacked.sparsity(known)
        if keep_zeros:
            view.sparsity = {n.removesuffix(".weight"): Sparsity() for n in view.names if n.endswith(".weight")} | view.sparsity
        return skeleton, view
    if keep_zeros or unpacked.sparsity(known):
        raise CompressError(f"{folder}: pruned, and a rotation would fill its zeros", hint="use --no-rotate", usage=True)
    untied = untie(config)
    skeleton = Skeleton(config, trust_remote_code)
    return skeleton, RotatedView(CheckpointReader(folder), skeleton, rotation.seed, untied)


class RotatedView(CheckpointView):
    """A checkpoint in the rotated basis. Rotated tensors are read in fp32; `dtype` stays the checkpoint's."""

    def __init__(self, reader: CheckpointReader, skeleton: Skeleton, seed: int, untied: bool) -> None:
        assert skeleton.family is not None
        model = skeleton.model
        names = {id(m): n for n, m in model.named_modules()}
        embedding, head = (f"{names[id(m)]}.weight" for m in (model.get_input_embeddings(), model.get_output_embeddings()))
        super().__init__(reader, skeleton, {head: embedding} if untied else {})
        self.untied = untied
        residual, config = check(skeleton.config), skeleton.config.get_text_config()
        if not residual:
            logger.warning("family %r has norms between its linears and the stream: only the heads are rotated", config.model_type)
        self.kv, self.rep, self.width = heads(config)
        self._R1 = Rotation(config.hidden_size, seed) if residual else None
        self._R2 = Rotation(self.width)
        if self._R1 is not None and not self._R1.hadamard:
            logger.warning("no Hadamard matrix of order %d is known: the residual stream gets a random rotation", self._R1.n)
        self._steps: dict[str, list[Step]] = {}
        for index in range(len(skeleton.blocks)):
            self._plan_block(skeleton, index)
        if self._R1 is not None:
            norm = next(m for m in skeleton.scalings() if m.norm)
            self._steps[embedding] = [self._R1.right]
            self._steps[head] = [self._scaled(f"{skeleton.family.final_norm}.weight", norm.norm_offset), self._R1.right]
            self._steps[f"{skeleton.family.final_norm}.weight"] = [_constant(1.0 - norm.norm_offset)]
            for name in skeleton.family.images or ():
                parts = [n for n in (name, f"{name}.weight", f"{name}.bias") if n in self._source]
                assert parts, f"{name} is not in the model"
                self._steps |= {part: [self._R1.left] for part in parts}

    def _plan_block(self, skeleton: Skeleton, index: int) -> None:
        prefix, family = skeleton.prefix(index), skeleton.family
        assert family is not None
        for mapping in skeleton.scalings():
            if mapping.norm and self._R1 is not None:
                norm = f"{prefix}{mapping.producer}.weight"
                for reader in mapping.consumers:
                    steps = [self._scaled(norm, mapping.norm_offset), self._R1.right]
                    self._steps.setdefault(f"{prefix}{reader}.weight", []).extend(steps)
                self._steps[norm] = [_constant(1.0 - mapping.norm_offset)]
        value = next(m for m in skeleton.scalings() if not m.norm and m.consumers[0] in family.writers)
        for suffix in ("weight", "bias"):
            self._steps.setdefault(f"{prefix}{value.producer}.{suffix}", []).append(functools.partial(self._values, value))
        self._steps.setdefault(f"{prefix}{value.consumers[0]}.weight", []).append(self._output)
        if self._R1 is not None:
            for writer in family.writers:
                for suffix in ("weight", "bias"):
                    self._steps.setdefault(f"{prefix}{writer}.{suffix}", []).append(self._R1.left)

    def _scaled(self, norm: str, offset: float) -> Step:
        """Columns times a norm's gain."""
        return lambda W: W.double() * (CheckpointView.read(self, norm).double() + offset)

    def _values(self, value: Scaling, W: torch.Tensor) -> torch.Tensor:
        """Hᵀ on each KV head's rows of W_v (or b_v)."""
        W = W.double()
        start, end = value.rows or (0, W.shape[0])
        part = W[start:end].view(self.kv, self.width, -1).transpose(1, 2)
        W[start:end] = self._R2.right(part).transpose(1, 2).reshape(W[start:end].shape)
        return W

    def _output(self, W: torch.Tensor) -> torch.Tensor:
        """H on each query head's columns of W_o."""
        return self._R2.right(W.view(W.shape[0], self.kv * self.rep, self.width)).view(W.shape)

    def _apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for step in self._steps[name]:
            tensor = step(tensor)
        return tensor.float()

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        return self._apply(name, tensor) if name in self._steps else tensor

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        tensor = super().read_rows(name, rows)
        return self._apply(name, tensor) if name in self._steps else tensor

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a reader; a writer's rows mix."""
        tensor = super().read_slice(name, start, stop)
        assert self._R1 is None or self._R1.left not in self._steps.get(name, ()), f"{name}: its rows mix"
        return self._apply(name, tensor) if name in self._steps else tensor

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Flat pieces of whole rows, each rotated by itself; a writer's rows mix, so it is one piece."""
        if name not in self._steps:
            yield from super().chunks(name)
            return
        if self._R1 is not None and self._R1.left in self._steps[name]:
            yield self.read(name).flatten()
            return
        width = self.shape(name)[-1]
        limit = max(1, _PIECE // width) * width * itemsize(self.dtype(name))
        for piece in self.reader.chunks(self.source(name), limit):
            yield self._apply(name, piece.view(-1, width) if len(self.shape(name)) > 1 else piece).flatten()


def _constant(value: float) -> Step:
    return lambda tensor: torch.full_like(tensor, value, dtype=torch.float32)

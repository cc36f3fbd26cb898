"""A checkpoint's blocks for a walk: read as stored, turned to (O, I), made into parameters of the compute dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compress.formats import armor
from compress.models.skeleton import Skeleton
from compress.models.view import CheckpointView
from compress.pipeline.layout import Layout
from compress.types import Block, Wrappers

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one model. Names are relative to the block; linear weights are (O, I) unless a module asks otherwise."""

    skeleton: Skeleton
    view: CheckpointView
    device: str
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    def load(self, index: int) -> Tensors:
        """A block's tensors as stored; linear weights turned to (O, I)."""
        prefix = self.skeleton.prefix(index)
        names = [n for n in self.view.names if n.startswith(prefix)]
        return {n.removeprefix(prefix): self.turn(n, self.view.read(n).to(self.device)) for n in names}

    def turn(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Swap a Conv1D weight (by its full name) between (I, O) and (O, I); anything else as it is."""
        return tensor.T.contiguous() if name in self.skeleton.conv1d_weights else tensor

    def compute(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Parameters and buffers of a block as its module wants them, in the compute dtype on the device."""
        block = self.skeleton.blocks[index]
        buffers = {n: tensors.get(n, b).to(self.device) for n, b in block.named_buffers()}
        return self.params(index, {n: tensors[n] for n, _ in block.named_parameters()}) | buffers

    def params(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Tensors as the module wants them."""
        prefix = self.skeleton.prefix(index)
        whole = {n: self._wrapped(prefix + n, t) for n, t in tensors.items()}
        return {n: self.turn(prefix + n, t).to(self.device, self.dtype) for n, t in whole.items()}

    def _wrapped(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The weight that a core stands for; anything else as it is."""
        wrappers = self.wrappers(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return tensor if wrappers is None else armor.wrap(tensor.float(), *wrappers)

    def wrappers(self, linear: str) -> Wrappers | None:
        """pre and post, fp32, of a linear by its full name, if its weight is a core."""
        known = self.view.sparsity.get(linear)
        if known is None or known.wrapped is None:
            return None
        pre, post = self.view.wrappers(linear)
        return pre.to(self.device).float(), post.to(self.device).float()

    def split(self, index: int, loaded: Tensors, layout: Layout) -> Block:
        """A loaded block as methods see it; `loaded` loses the linears to compress."""
        skeleton, prefix = self.skeleton, self.skeleton.prefix(index)
        chosen = [n for n in skeleton.linears(index) if prefix + n in layout.targets]
        return Block(
            index, {n: loaded.pop(f"{n}.weight") for n in chosen}, loaded, skeleton.groups(index), skeleton.scalings(),
            skeleton.no_clip(index), {n: layout.targets[prefix + n].params for n in chosen},
            sparse=frozenset(n for n in chosen if prefix + n in self.view.sparsity),
            wrappers={n: found for n in chosen if (found := self.wrappers(prefix + n)) is not None},
        )  # fmt: skip

    @staticmethod
    def tensors(block: Block) -> Tensors:
        """All tensors of a block, as loaded."""
        return {**{f"{n}.weight": W for n, W in block.weights.items()}, **block.tensors}

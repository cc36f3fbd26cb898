"""A checkpoint's tensors under the names that the model gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.checkpoint import dtypes
from compress.checkpoint.dtypes import finite
from compress.checkpoint.mapped import Place, Places
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.unpacked import UnpackedReader
from compress.errors import CompressError
from compress.models import auto
from compress.types import Sparsity, TensorSpec, Wrappers

if TYPE_CHECKING:
    from compress.models.skeleton import Skeleton


class CheckpointView:
    """A checkpoint's tensors, as stored, under the names of the model's state dict, however the checkpoint spells them.

    Tensors that the model does not know are listed in `extra` and travel unchanged. `aliases` names the tensor to read for a
    name that must not be read itself.
    """

    untied = False  # whether a tied head became a tensor of its own
    sparsity: Mapping[str, Sparsity] = {}  # linears whose zeros must stay zeros, by full name

    def __init__(self, reader: CheckpointReader, skeleton: Skeleton, aliases: Mapping[str, str] | None = None) -> None:
        self.reader = reader
        wanted = skeleton.parameters()
        spelled = {name: stored for stored, name in auto.spelling(skeleton.model, reader.names).items()}
        self._source: dict[str, str] = {}
        buffers = dict(skeleton.model.named_buffers())
        for name, shape in wanted.items():
            source = spelled.get((aliases or {}).get(name, name))
            if source is None:
                if name in buffers:  # derived by the model, stored only by some versions
                    continue
                experts = ".experts." in name and any(".experts." in n for n in reader.names)
                raise CompressError(
                    f"{reader.folder}: tensor {name} is missing",
                    hint="mixture-of-experts checkpoints that store experts one by one are not supported yet"
                    if experts
                    else "the checkpoint is incomplete, config.json is another model's, or its tensors are renamed on load",
                )
            if reader.shape(source) != shape:
                raise CompressError(
                    f"{reader.folder}: {source} has shape {reader.shape(source)}, config.json asks for {shape}",
                    hint="the checkpoint and config.json do not belong together",
                )
            self._source[name] = source
        taken = set(self._source.values())
        self.extra = [n for n in reader.names if n not in taken and n not in self._source]

    def wrappers(self, linear: str) -> Wrappers:
        """pre and post of a linear that `sparsity` calls wrapped."""
        assert isinstance(self.reader, UnpackedReader)
        return self.reader.wrappers(linear)

    @property
    def names(self) -> list[str]:
        """The model's names in its own order, then what else the checkpoint holds."""
        return [*self._source, *self.extra]

    def source(self, name: str) -> str:
        """The checkpoint's own name of a tensor."""
        return self._source.get(name, name)

    def dtype(self, name: str) -> str:
        return self.reader.dtype(self.source(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored (Conv1D: (I, O))."""
        return self.reader.shape(self.source(name))

    def read(self, name: str) -> torch.Tensor:
        """One tensor as stored; NaN or Inf is an error that names it."""
        tensor = self.reader.read(self.source(name))
        check_finite(self.source(name), tensor)
        return tensor

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        tensor = self.reader.read_rows(self.source(name), rows)
        check_finite(self.source(name), tensor)
        return tensor

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of one tensor seen as a matrix, leading dimensions flattened."""
        tensor = self.reader.read_slice(self.source(name), start, stop)
        check_finite(f"{self.reader.folder.name}: {self.source(name)}", tensor)
        return tensor

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor in flat pieces."""
        for piece in self.reader.chunks(self.source(name)):
            check_finite(self.source(name), piece)
            yield piece


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Stop at NaN or Inf with the tensor's name."""
    if not finite(tensor):
        raise CompressError(f"{name}: holds NaN or Inf", hint="the checkpoint is damaged or its training diverged: get a good copy")


class StoredTensors:
    """An artifact's tensors under the names that the model gives them, however the folder spells them."""

    def __init__(self, model: nn.Module, reader: CheckpointReader) -> None:
        self._reader = reader
        self._places = Places(reader)
        self._stored = {name: stored for stored, name in auto.spelling(model, reader.names).items()}
        self.names = self._stored.keys()

    def spec(self, name: str) -> TensorSpec:
        return self._reader.dtype(self._stored[name]), self._reader.shape(self._stored[name])

    def read(self, name: str) -> torch.Tensor:
        return self._reader.read(self._stored[name])

    def place(self, name: str) -> Place | None:
        """Where a tensor lies, if it can be put aside."""
        return self._places(self._stored[name])

    def read_as(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A dense tensor in another dtype or on another device, in pieces, so that it is never there twice."""
        stored = self._reader.entry(self._stored[name])
        if dtypes.TORCH[stored.dtype] == dtype and device.type == "cpu":
            return self.read(name)
        out, done = torch.empty(stored.shape, dtype=dtype, device=device), 0
        for piece in self._reader.chunks(self._stored[name]):
            out.view(-1)[done : done + len(piece)] = piece.to(device)
            done += len(piece)
        return out

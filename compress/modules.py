"""`CompressedLinear` and `CompressedEmbedding` stand where a linear or an embedding stood: the artifact's tensors, and a kernel.

Their buffers are the artifact's tensors. A kernel path with a layout of its own does not need them once it is prepared: they are
then put aside as pages of the file that they were read from (`checkpoint.mapped`), so that a weight lies in memory once. Of a
weight on a GPU too: these buffers are then on the CPU, and come back to the weight's device when it is prepared again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from compress_kernels import BackendError
from compress_kernels.int_grouped import rows as gather
from torch import nn

from compress import registry
from compress.checkpoint import dtypes
from compress.checkpoint.mapped import Place
from compress.errors import CompressError
from compress.types import Packed

_KERNELS: dict[str, ModuleType] = {}  # kind -> its package, once it was asked for
_FEW = 16  # rows of x that every kernel with a layout of its own multiplies by that


def _written(pages: torch.Tensor) -> bool:
    """Whether somebody may have written to a tensor."""
    return pages.is_inference() or bool(pages._version)


class CompressedWeight(nn.Module):
    """A weight (O, I) stored in a format's tensors, which are this module's buffers.

    Buffers carry the format's names (`weight_packed`, `weight_scale`, …), so state-dict names equal those on disk. They
    keep their stored dtypes through `.to(dtype)`: only the arithmetic's dtype changes, never the weight's values.
    There is no `weight` parameter; `dense_weight()` makes one.
    """

    _home: torch.device | None = None  # where buffers that were put aside belong
    _gathers = False  # whether rows of the buffers are read on their device
    group: Any = None  # linears that read the same input as this one (`fusion.Group`)

    def __init__(
        self, kind: str, params: Mapping[str, Any], shape: tuple[int, int], *, stored: str, dtype: torch.dtype,
        device: str | torch.device = "meta",
    ) -> None:  # fmt: skip
        """`stored` is the safetensors dtype of the format's float tensors, `dtype` that of activations."""
        super().__init__()
        self.kind, self.params, self.dtype, self.shape = kind, dict(params), dtype, shape
        for name, (tensor_dtype, size) in registry.by_kind(kind).spec(params, shape, stored).items():
            self.register_buffer(name, torch.empty(size, dtype=dtypes.TORCH[tensor_dtype], device=device))
        self.exact = False
        self.prepared: Any = None
        self.places: dict[str, Place] = {}  # buffer -> where it was read from
        self._aside: dict[str, torch.Tensor] = {}  # buffers that are pages of a file

    @property
    def path(self) -> str:
        """Name of the kernel path that runs; "unprepared" where the weight is offloaded and decoded on each call."""
        return "unprepared" if self.prepared is None else self.prepared.path

    @property
    def _kernel(self) -> ModuleType:
        found = _KERNELS.get(self.kind)  # torch.compile traces a look-up, but no import
        if found is None:
            found = _KERNELS[self.kind] = importlib.import_module(f"compress_kernels.{self.kind}")
        return found

    def _prepare(self, exact: bool) -> Any:
        return self._kernel.prepare(self._buffers, self.params, self.shape, self.dtype, exact)

    def prepare(self, exact: bool | None = None) -> None:
        """Build what the kernel needs from the loaded buffers; `exact` keeps to paths that equal the reference."""
        self.exact = self.exact if exact is None else exact
        self.prepared = None
        if not any(b.is_meta for b in self.buffers()):
            self._recall()
            self.prepared = self._prepare(self.exact)
            self._put_aside()
            if self.group is not None:
                self.group.settle()

    def _is_aside(self, name: str) -> bool:
        return name in self._aside and self._buffers[name] is self._aside[name]

    def _read(self, name: str) -> torch.Tensor:
        """A buffer that was put aside, in memory: the file's numbers, or what somebody wrote into the pages."""
        pages = self._aside[name]
        self.check()
        return (pages.clone() if _written(pages) else self.places[name].read()).to(self._home)

    def check(self) -> None:
        """Raise where the file of buffers that were put aside was written to."""
        if self._aside and not torch.compiler.is_compiling():
            for file in {place.file for name, place in self.places.items() if name in self._aside}:
                if file is not None:
                    file.check()

    def _recall(self) -> None:
        """Read what was put aside into memory again."""
        for name in self._aside:
            if self._is_aside(name):
                self._buffers[name] = self._read(name)
        self.places = {n: place for n, place in self.places.items() if n not in self._aside or not _written(self._aside[n])}
        self._aside = {}

    def _put_aside(self) -> None:
        """Give up the memory of buffers that the prepared kernel does not need."""
        if not getattr(self.prepared, "spare", False):
            return
        devices = {b.device for b in self._buffers.values() if b is not None}
        if len(devices) != 1 or not self._may_leave(next(iter(devices))):
            return
        self._home = next(iter(devices))
        for name, place in self.places.items():
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype == dtypes.TORCH[place.entry.dtype]:
                self._buffers[name] = self._aside[name] = place.view()

    def _may_leave(self, device: torch.device) -> bool:
        """Whether buffers on a device can be put aside: off a CPU only those that the prepared kernel never reads."""
        return device.type == "cpu" or (device.type == "cuda" and self.path == "triton" and not self._gathers)

    def passed_over(self) -> dict[str, str]:
        """Path -> why it does not run, of every other path of the kind."""
        mine, known = self.path, dict(getattr(self.prepared, "reasons", {}))
        rest = [p for p in getattr(self._kernel, "PATHS", ()) if p != mine and p not in known]
        return known | dict.fromkeys(rest, f"{mine} comes first")

    def held(self) -> list[torch.Tensor]:
        """The buffers that are in memory."""
        return [b for name, b in self.named_buffers() if not self._is_aside(name)]

    def dense_weight(self) -> torch.Tensor:
        """The weight (O, I) in fp32."""
        form = registry.by_kind(self.kind)
        tensors = {name: self._read(name) if self._is_aside(name) else b for name, b in self.named_buffers()}
        return form.dequantize(Packed(self.kind, form.VERSION, self.params, tensors, self.shape))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompressedWeight:
        """Move with `.to()`, `.cuda()`, …; then prepare again for the new device and dtype."""
        self.check()
        before = dict(self.named_buffers())
        home = None if self._home is None else fn(torch.empty(0, device=self._home)).device
        super()._apply(fn, recurse)
        self._home = home  # of buffers that fn left where they were put aside
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                device = self._buffers[name].device
                self._buffers[name] = old if device == old.device else old.to(device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.prepared is not None:
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._recall()
        self.places = {}  # the file's tensors are no longer this module's
        super()._load_from_state_dict(*args, **kwargs)
        if self.prepared is not None:
            self.prepare()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.check()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.check()
        state = self.__dict__.copy()
        if any(map(_written, self._aside.values())):
            state["places"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self._aside:  # in memory again, or copied, wherever they belong
            self._buffers[name] = self._buffers[name].to(self._home)
        self.places = {name: place for name, place in self.places.items() if place.file is not None}
        self._aside = {}
        self._put_aside()

    def extra_repr(self) -> str:
        params = ", ".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.shape[1]} -> {self.shape[0]}, {self.kind}({params}), {self.path}"


class CompressedLinear(CompressedWeight):
    """y = x Wᵀ + bias for a stored weight (O, I)."""

    def __init__(
        self, kind: str, params: Mapping[str, Any], shape: tuple[int, int], *, stored: str, dtype: torch.dtype, bias: bool = False,
        device: str | torch.device = "meta",
    ) -> None:  # fmt: skip
        """`dtype` is that of activations and bias; the rest as for `CompressedWeight`."""
        super().__init__(kind, params, shape, stored=stored, dtype=dtype, device=device)
        self.out_features, self.in_features = shape
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device), False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., I) -> (..., O)."""
        if x.numel() > _FEW * self.in_features:  # some kernels read the artifact's tensors for many rows
            self.check()
        return self._kernel.linear(x, self.prepared or self._prepare(exact=True), self.bias)


class CompressedEmbedding(CompressedWeight):
    """Rows of a stored weight (V, D) by token; whatever else the embedding does to them it still does.

    `tied` prepares the weight for products too: a `TiedLinear` reads it as the model's head.
    """

    _gathers = True

    def __init__(self, embedding: nn.Embedding, kind: str, params: Mapping[str, Any], *, stored: str, dtype: torch.dtype) -> None:
        shape = embedding.num_embeddings, embedding.embedding_dim
        super().__init__(kind, params, shape, stored=stored, dtype=dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.tied = False
        embedding.padding_idx = None  # it is handed the rows of a text only; a forward pass does not use it
        self._inner = None if type(embedding) is nn.Embedding else (embedding,)  # in a tuple: not a submodule

    @property
    def path(self) -> str:
        """Name of the kernel path of its products; "rows" where it is only looked up."""
        return super().path if self.tied else "rows"

    def prepare(self, exact: bool | None = None) -> None:
        """As `CompressedWeight`, where products are taken with the weight."""
        if self.tied:
            super().prepare(exact)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) -> (..., D). Ids beyond the table raise an IndexError, as they do in torch's (on a CPU)."""
        self.check()
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and bool((ids < 0).any()):
            raise IndexError("index out of range in self")  # an index into a tensor would count from the end
        x = gather(self._buffers, self.params, self.shape, ids.reshape(-1)).to(self.dtype)
        if self._inner is None:
            return x.view(*ids.shape, self.embedding_dim)
        inner = self._inner[0]
        tensors = {"weight": x, **{name: b.to(x.device) for name, b in inner.named_buffers()}}
        return torch.func.functional_call(inner, tensors, (torch.arange(len(x), device=x.device).view(ids.shape),))


class TiedLinear(CompressedLinear):
    """A head that reads its embedding's weight; it has no tensors but a bias."""

    def __init__(self, source: CompressedEmbedding, bias: bool) -> None:
        nn.Module.__init__(self)
        source.tied = True
        self._source = (source,)  # in a tuple: not a submodule
        self.kind, self.params, self.dtype, self.shape = source.kind, source.params, source.dtype, source.shape
        self.out_features, self.in_features = source.shape
        self.bias = nn.Parameter(torch.empty(source.shape[0], dtype=source.dtype, device="meta"), False) if bias else None
        self.places, self._aside = {}, {}

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self._source[0].exact

    @property
    def prepared(self) -> Any:  # type: ignore[override]
        return self._source[0].prepared

    def prepare(self, exact: bool | None = None) -> None:
        """The embedding prepares itself; it must be there."""
        if any(b.is_meta for b in self._source[0].buffers()):
            raise CompressError("the embedding is offloaded, and the head reads it", hint="keep it on a device in device_map")

    def _prepare(self, exact: bool) -> Any:
        return self._source[0]._prepare(exact)

    def dense_weight(self) -> torch.Tensor:
        """The weight (O, I) in fp32."""
        return self._source[0].dense_weight()


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, I) of a linear, None for any other module. A Conv1D keeps its weight as (I, O); artifacts hold (O, I)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":
        return module.nf, module.nx
    return None


def place(model: nn.Module, name: str, value: nn.Module | torch.Tensor) -> None:
    """Put a module, parameter or buffer in the place of the one that is called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def prepare(model: nn.Module, exact: bool) -> None:
    """Prepare every compressed weight of a model whose tensors are in place."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedWeight):
            prepare_one(name, module, exact)


def prepare_one(name: str, module: CompressedWeight, exact: bool) -> None:
    """Prepare one compressed weight; what is wrong with its tensors is an error that names it."""
    try:
        module.prepare(exact)
    except ValueError as error:
        hint = "use another value" if isinstance(error, BackendError) else "the artifact is damaged: copy it again"
        raise CompressError(f"{name}: {error}", hint=hint) from error

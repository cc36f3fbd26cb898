"""transformers' cache of keys and values with room for the tokens to come."""

from __future__ import annotations

import functools
from typing import Any

import torch

_ROOM = 256  # places that a buffer gets beyond those that it needs, at least


class Growing:
    """Keys and values (B, H, length, head_dim), views of one buffer (2, B, H, capacity, head_dim).

    It answers as a DynamicLayer of transformers does, but appending moves no older tokens unless the buffer is full.
    """

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        self.buffer: torch.Tensor | None = None
        self.length = 0
        self.is_initialized = False
        self.held: Any = None  # the first layer's: all layers' buffers, and their addresses for the kernel
        if keys is not None and values is not None:
            self.update(keys, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self)()
        made.__dict__ |= {**self.__dict__, "buffer": None if self.buffer is None else self.buffer.clone(), "held": None}
        return made

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self.buffer is None else self.buffer[0, :, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._plain().keys = keys

    @property
    def values(self) -> torch.Tensor | None:
        return None if self.buffer is None else self.buffer[1, :, :, : self.length]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._plain().values = values

    def _plain(self) -> Any:
        """This layer as transformers' own, for somebody who puts tensors of his into it."""
        from transformers.cache_utils import DynamicLayer

        plain: Any = self
        keys, values = self.keys, self.values
        del plain.buffer, plain.length, plain.held
        plain.__class__ = DynamicLayer
        plain.keys, plain.values = keys, values
        return plain

    def __reduce__(self) -> Any:
        keys, values = self.keys, self.values
        return _restored, (None if keys is None else keys.clone(), None if values is None else values.clone())

    @property
    def capacity(self) -> int:
        """Places of the buffer."""
        return 0 if self.buffer is None else self.buffer.shape[3]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        B, H, _, d = key_states.shape
        self.device = key_states.device
        self.buffer = key_states.new_empty(2, B, H, 0, d)
        self.is_initialized = True

    def make_room(self, tokens: int) -> None:
        """Have places for so many more tokens."""
        assert self.buffer is not None
        needed = self.length + tokens
        if needed > self.capacity:
            _, B, H, _, d = self.buffer.shape
            old, self.buffer = self.buffer, self.buffer.new_empty(2, B, H, needed + max(_ROOM, needed // 2), d)
            self.buffer[:, :, :, : self.length] = old[:, :, :, : self.length]
        elif self.buffer.is_inference() and not torch.is_inference_mode_enabled():
            self.buffer = self.buffer.clone()  # torch lets nobody write to it

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        assert self.buffer is not None
        if len(key_states) != self.buffer.shape[1]:
            raise ValueError(f"keys of {len(key_states)} texts for a cache of {self.buffer.shape[1]}")
        new = self.buffer, key_states, value_states
        if len({t.dtype for t in new}) > 1 or (torch.is_grad_enabled() and any(t.requires_grad for t in new)):
            # autograd may need the old buffer as it was
            self.buffer = torch.cat([self.buffer[:, :, :, : self.length], torch.stack([key_states, value_states])], 3)
            self.length += count
            return self.keys, self.values
        self.make_room(count)
        self.buffer[0, :, :, self.length : self.length + count] = key_states
        self.buffer[1, :, :, self.length : self.length + count] = value_states
        self.length += count
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def reset(self) -> None:
        self.buffer, self.held, self.length, self.is_initialized = None, None, 0, False

    def crop(self, tokens: int) -> None:
        """Drop the last -tokens; older versions of transformers give the length that is to be left."""
        self.length = max(0, self.length + tokens) if tokens <= 0 else min(self.length, tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(1, beam_idx.to(self.buffer.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.buffer is not None:
            self.buffer = self.buffer.repeat_interleave(repeats, dim=1)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.buffer is not None:
            self.buffer = self.buffer[:, indices, ...]


@functools.cache
def growing_layer() -> Any:
    """`Growing` as one of transformers' layers, which is imported here."""
    from transformers.cache_utils import DynamicLayer

    own = {name: value for name, value in vars(Growing).items() if name not in ("__dict__", "__weakref__")}
    return type("GrowingLayer", (DynamicLayer,), own)  # of one base, so that `_plain` can take it away


def _restored(keys: torch.Tensor | None, values: torch.Tensor | None) -> Any:
    return growing_layer()(keys, values)


def adopt(cache: Any, blocks: int) -> bool:
    """Give an ordinary DynamicCache growing layers, with what it holds; False where it is another cache."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    Layer = growing_layer()
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    if len(cache.layers) == blocks and all(type(layer) is Layer for layer in cache.layers):
        return True
    if not cache.layers:
        if getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
            return False
        cache.layers = [Layer() for _ in range(blocks)]
        return True
    if len(cache.layers) != blocks or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    cache.layers = [Layer(layer.keys, layer.values) if layer.get_seq_length() else Layer() for layer in cache.layers]
    return True

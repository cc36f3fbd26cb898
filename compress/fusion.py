"""On a GPU one launch for linears that read the same input: q, k, v of an attention, gate and up of an MLP.

`attach(model)` finds the groups, by the family's table. As soon as all members of one are prepared for the Triton kernels, and
agree in what `int_grouped.fused` asks for, their weights become views of one weight, and the parent's forward runs on a stand-in
for the parent: the first member that is handed an input multiplies the whole with it, the others give out their part of that
product if they are handed the very same tensor, unwritten since; another tensor begins another product.

Nothing outlives a call of the parent, and a part is given out once: no product can be stale. (Whether an inference tensor was
written to, torch does not tell; between the members nothing runs but transformers' own forward, which writes to none.) Modules,
names, buffers and what is saved stay as they were; a member that is called alone, by whomever, runs alone. Members that were
replaced, prepared again, given hooks or a forward of their own, a parent whose forward is not transformers' own, and inputs that
need gradients are served one by one.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from compress_kernels.int_grouped import fused
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from compress.models import families
from compress.modules import CompressedLinear

logger = logging.getLogger(__name__)


class Group:
    """Linears of one parent that read the same input."""

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        self.parent, self.names = parent, tuple(names)
        self.forward = type(parent).forward  # what a stand-in is made for
        self.reason = "its members are not prepared"
        self._whole: Any = None  # the members' weights as one
        self._held: list[tuple[CompressedLinear, Any]] = []  # the members, and what they had prepared

    @property
    def members(self) -> list[Any]:
        """The modules in the members' places."""
        return [self.parent._modules.get(name) for name in self.names]

    def settle(self) -> None:
        """Make the members' weights one, if they can be; a member calls it when it has prepared itself."""
        members = self.members
        if self._whole is not None and self._unchanged():
            return
        self._whole, self._held = None, []
        weights: list[Any] = [getattr(m.prepared, "gpu", None) if type(m) is CompressedLinear else None for m in members]
        own = vars(self.parent).get("forward")
        if own is not None and _is_ours(own):
            del self.parent.forward
            own = None
        if any(w is None for w in weights):
            self.reason = "its members are not all on the Triton path"
            return
        why = fused.why_not(weights)
        if why is not None or own is not None:
            self.reason = why or "somebody replaced the parent's forward"
            logger.debug("%s of a %s: not one launch: %s", self.names, type(self.parent).__name__, self.reason)
            return
        self._whole, parts = fused.fuse(weights)
        for m, part in zip(members, parts, strict=True):
            m.prepared = replace(m.prepared, gpu=part)
        self._held = [(m, m.prepared) for m in members]
        self.parent.forward = functools.partial(_forward, self)  # type: ignore[assignment]

    def _unchanged(self) -> bool:
        return all(
            now is m and m.prepared is prepared for now, (m, prepared) in zip(self.members, self._held, strict=True)
        )  # fmt: skip

    def interrupted(self) -> bool:
        """Whether the members must run one by one now."""
        return (
            self._whole is None
            or type(self.parent).forward is not self.forward
            or not self._unchanged()
            or any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m, _ in self._held)
            or any(m._backward_hooks or m._backward_pre_hooks for m, _ in self._held)
            or _has_any_global_hook()
        )

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the whole can multiply x."""
        ours = x.device == self._whole.words.device and x.dtype != torch.float64 and x.shape[-1] == self._whole.shape[1]
        return ours and not (x.requires_grad and torch.is_grad_enabled())

    def product(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """Every member's output (..., O_i) for x (..., I), by one launch."""
        biases = [m.bias for m, _ in self._held]
        return [*fused.linear(x, self._whole, [p.gpu for _, p in self._held], biases)]


class _Call:
    """One call of a parent: the last input that a member was handed, and the parts of its product that were not given out yet."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.x: torch.Tensor | None = None
        self.version = 0
        self.parts: list[torch.Tensor | None] = []

    def part(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Member i's output for x."""
        member: CompressedLinear = self.group._held[i][0]
        if not self.group.takes(x):
            y: torch.Tensor = member(x)
            return y
        found = self.parts[i] if self.x is x and self.version == _version(x) else None
        if found is None:
            self.parts = self.group.product(x)
            self.x, self.version = x, _version(x)
            found = self.parts[i]
            assert found is not None
        self.parts[i] = None
        return found


def _version(x: torch.Tensor) -> int:
    """Counts writes to x; an inference tensor, and a tensor that is traced, does not tell."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class _Member:
    """Stands where a member stood."""

    def __init__(self, call: _Call, i: int) -> None:
        self._call, self._i = call, i

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._call.part(self._i, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.group._held[self._i][0], name)


class _Parent:
    """Stands where the parent stood: its attributes, but for the members."""

    def __init__(self, group: Group) -> None:
        call = _Call(group)
        members = {name: _Member(call, i) for i, name in enumerate(group.names)}
        self.__dict__.update(members, _compress_parent=group.parent)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compress_parent, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._compress_parent, name, value)


def _forward(group: Group, *args: Any, **kwargs: Any) -> Any:
    parent: Any = group.parent if group.interrupted() else _Parent(group)
    return type(group.parent).forward(parent, *args, **kwargs)


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _forward


def attach(model: Any) -> None:
    """Find the groups of a model whose compressed linears are in place, not yet prepared."""
    family = families.find(model.config.get_text_config())
    groups = [] if family is None else [[n.rpartition(".") for n in group] for group in family.groups if len(group) > 1]
    for name, parent in model.named_modules():
        cls = type(parent)
        if not all(at.__module__.startswith("transformers.models.") for at in (cls, cls.forward)):
            continue
        if "__class__" in inspect.unwrap(cls.forward).__code__.co_freevars:  # super() needs the parent itself
            continue
        for group in groups:
            leaves = [leaf for _, _, leaf in group]
            place = {path for path, _, _ in group}
            if place == {name.rpartition(".")[2]} and all(type(parent._modules.get(n)) is CompressedLinear for n in leaves):
                made = Group(parent, leaves)
                for member in made.members:
                    member.group = made


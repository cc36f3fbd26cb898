"""The weights that `timing` times: one of every kind, made of random numbers and ready to run, and torch's own int4 as a peer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from compress_kernels import masked_delta
from compress_kernels.int_grouped import cpu_int4, reference
from compress_kernels.masked_delta import cpu as cpu_deltas

from compress import registry
from compress.errors import CompressError
from compress.modules import CompressedLinear
from compress.types import Packed


@dataclass(frozen=True, slots=True)
class Subject:
    """What is timed: a weight, ready to run."""

    run: Callable[[torch.Tensor], torch.Tensor]
    size: int  # bytes of the artifact's tensors
    path: str


Make = Callable[[int, int, torch.Generator], Subject]  # outputs, inputs


def _codes(O: int, I: int, bits: int, g: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (O, I), generator=g, dtype=torch.uint8)


def _scale(O: int, G: int, g: torch.Generator) -> torch.Tensor:
    return (torch.rand(O, G, generator=g) * 0.01 + 0.001).bfloat16()


def _integers(bits: int, O: int, I: int, g: torch.Generator) -> Packed:
    group = 128 if I % 128 == 0 else 64
    return registry.by_kind("int_grouped").pack(
        _codes(O, I, bits, g), _scale(O, I // group, g), _codes(O, I // group, bits, g), bits=bits, group_size=group
    )


def _outliers(O: int, I: int, g: torch.Generator) -> Packed:
    group = 128 if I % 128 == 0 else 64
    kept = torch.rand(O, I, generator=g) < 0.01
    q, zero = _codes(O, I, 4, g), _codes(O, I // group, 4, g)
    q[kept] = zero.repeat_interleave(group, 1)[kept]
    index = kept.view(-1).nonzero().squeeze(1)
    value = torch.randn(len(index), generator=g).bfloat16()
    return registry.by_kind("int_grouped_outliers").pack(
        q, _scale(O, I // group, g), zero, bits=4, group_size=group, index=index, value=value
    )


def _half(O: int, I: int, g: torch.Generator) -> torch.Tensor:
    """A 2:4 mask."""
    return (torch.rand(O, I // 4, 4, generator=g).argsort(-1) < 2).view(O, I)


def _sparse24(O: int, I: int, g: torch.Generator) -> Packed:
    mask = _half(O, I, g)
    return registry.by_kind("sparse24").pack(torch.randn(O, I, generator=g).bfloat16() * mask, mask, n=2, m=4)


def _sparse24_int(O: int, I: int, g: torch.Generator) -> Packed:
    group = 128 if I % 128 == 0 else 64
    q, scale, zero = _codes(O, I // 2, 4, g), _scale(O, I // group, g), _codes(O, I // group, 4, g)
    return registry.by_kind("sparse24_int").pack(q, _half(O, I, g), scale, zero, bits=4, group_size=group, n=2, m=4)


def _bitmask(O: int, I: int, g: torch.Generator) -> Packed:
    mask = torch.rand(O, I, generator=g) < 0.5
    return registry.by_kind("bitmask").pack(torch.randn(O, I, generator=g).bfloat16() * mask, mask)


def _armor(O: int, I: int, g: torch.Generator) -> Packed:
    blocks = [(torch.randn(n // b, b, b, generator=g) / b**0.5).bfloat16() for n, b in ((n, _block(n)) for n in (I, O))]
    return registry.by_kind("armor").pack(_sparse24(O, I, g), *blocks)


def _block(n: int) -> int:
    return max(b for b in range(1, 129) if n % b == 0)


def _factors(O: int, I: int, g: torch.Generator, bits: int | None = None) -> Packed:
    """Half of the weights: a quarter of them in whole columns, the rest in thin factors."""
    kept = I // 4
    rank = (O * I // 2 - O * kept) // (O + I - kept)
    form, columns = registry.by_kind("lowrank_sparse"), torch.randperm(I, generator=g)[:kept].sort().values
    B, A, W_s = (torch.randn(*size, generator=g) / 8 for size in ((O, rank), (rank, I - kept), (O, kept)))
    if bits is None:
        return form.pack(B.bfloat16(), A.bfloat16(), columns, W_s.bfloat16(), I)
    pairs = [
        (_codes(rows, 64 * groups, bits, g), _scale(rows, groups, g))
        for rows, groups in ((rank, -(-(I - kept) // 64)), (O, -(-(rank + kept) // 64)))
    ]
    return form.pack_codes(pairs[0], pairs[1], columns, I, bits=bits, group=64, rank=rank)


def module(packed: Packed) -> CompressedLinear:
    """A weight as the layer that runs it."""
    layer = CompressedLinear(packed.kind, packed.params, packed.shape, stored="BF16", dtype=torch.bfloat16, device="cpu")
    for name, tensor in packed.tensors.items():
        layer._buffers[name] = tensor
    layer.prepare()
    return layer


def _packed(make: Callable[[int, int, torch.Generator], Packed], backend: str | None = None) -> Make:
    """A weight of a kind, by the path that is best or that COMPRESS_BACKEND would choose."""

    def subject(O: int, I: int, g: torch.Generator) -> Subject:
        packed = make(O, I, g)
        before = {} if backend is None else {"COMPRESS_BACKEND": os.environ.get("COMPRESS_BACKEND", "")}
        os.environ.update({} if backend is None else {"COMPRESS_BACKEND": backend})
        try:
            layer = module(packed)
        finally:
            os.environ.update(before)
        return Subject(layer, _size(packed), layer.path)

    return subject


def _size(packed: Packed) -> int:
    return sum(t.numel() * t.element_size() for t in packed.tensors.values())


def _int4pack(O: int, I: int, g: torch.Generator) -> Subject:
    """torch's own op, whatever the number of rows: a peer."""
    packed = _integers(4, O, I, g)
    t, group = packed.tensors, packed.params["group_size"]
    zero = reference.zeros(t["weight_zero_point"], 4, O)
    why = cpu_int4.can_run(4, group, (O, I), torch.bfloat16, torch.device("cpu"))
    if why is not None:
        raise CompressError(f"int4pack cannot be timed: {why}", hint="name other kinds", usage=True)
    weight, scales = cpu_int4.prepare(t["weight_packed"], t["weight_scale"], zero, (O, I))
    return Subject(lambda x: cpu_int4.linear(x, weight, scales, group, None), _size(packed), "torch")


def _deltas(count: int, loop: bool = False) -> Make:
    """A 16-bit base and `count` tasks, which the rows of x are of in turns; or, as a loop, every task's rows by themselves."""

    def subject(O: int, I: int, g: torch.Generator) -> Subject:
        base, shared = (torch.randn(O, I, generator=g).bfloat16() for _ in range(2))
        words = torch.randint(-(1 << 31), 1 << 31, (count, O, -(-I // 32)), generator=g, dtype=torch.int64).to(torch.int32)
        deltas = {f"task {i}": masked_delta.Delta(words[i], 0.3 + i) for i in range(count)}
        names, vector = list(deltas), masked_delta.Shared(shared)

        def part(x: torch.Tensor, tasks: list[str]) -> torch.Tensor:
            return masked_delta.linear(x, base, None, vector, deltas, False, tasks)

        def run(x: torch.Tensor) -> torch.Tensor:
            tasks = [names[i % count] for i in range(len(x))]
            if not loop:
                return part(x, tasks)
            out = x.new_empty(len(x), O)
            for i, name in enumerate(names[: len(x)]):
                out[i::count] = part(x[i::count], [name])
            return out

        why = cpu_deltas.can_run(base, base, None, vector)
        return Subject(run, 4 * O * I + words.numel() * 4, "tiled" if why else "cpu")

    return subject


KINDS: dict[str, Callable[[int, int, torch.Generator], Packed]] = {
    "int4": lambda O, I, g: _integers(4, O, I, g),
    "int3": lambda O, I, g: _integers(3, O, I, g),
    "int2": lambda O, I, g: _integers(2, O, I, g),
    "int8": lambda O, I, g: _integers(8, O, I, g),
    "int4+1%": _outliers,
    "bitmask": _bitmask,
    "sparse24": _sparse24,
    "sparse24_int4": _sparse24_int,
    "armor": _armor,
}
SUBJECTS: dict[str, Make] = {
    "int4": _packed(KINDS["int4"]),
    "int4 exact": _packed(KINDS["int4"], "cpu-exact"),
    "int4pack": _int4pack,
    **{name: _packed(make) for name, make in KINDS.items() if name != "int4"},
    "lowrank_sparse": _packed(_factors),
    "lowrank_int4": _packed(lambda O, I, g: _factors(O, I, g, 4)),
    "delta": _deltas(1),
    "delta 4 mixed": _deltas(4),
    "delta 4 loop": _deltas(4, loop=True),
}
TOGETHER = (("int4", "int4 exact", "int4pack", "int4+1%"), ("delta 4 mixed", "delta 4 loop"))  # timed in the same turns

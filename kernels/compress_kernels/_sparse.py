"""What the sparse kinds share: positions in groups of M, masks in bytes, tiles of whole rows, and the choice of a path.

N of every M consecutive inputs are kept. A position is a column in its group, 0..M-1; a row's positions ascend in each group
and are codes of `position_bits(M)` bits, lowest bits first, the row padded to a whole byte. 2:4 has two groups in a byte.

Paths: "cpu" is the C++ library, which multiplies the kept values only; "dense" decodes a weight once, into the activations'
dtype, and is an ordinary product from then on; "tiled" decodes tiles of whole rows on every call. The first that can run is
taken, or what COMPRESS_BACKEND says. "dense" and "tiled" give the reference's weights bit for bit, and its sums up to their
order; "cpu" does not round weights to the activations' dtype, and is nearer to the fp64 product.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from compress_kernels import backend, dispatch
from compress_kernels import bits as bitpack
from compress_kernels.int_grouped import tiled as int_grouped
from compress_kernels.native import masked

logger = logging.getLogger(__name__)

CPU, DENSE, TILED = PATHS = "cpu", "dense", "tiled"
EXACT = "exact results were asked for"
LARGEST = 64  # the largest M
_PIECE = 1 << 20  # columns of a mask that are looked at together, 8 bytes each
Decode = Callable[[slice, torch.Tensor], object]  # writes the rows `tile` of a weight into out (R, I)


def position_bits(m: int) -> int:
    """Bits per position in a group of m columns."""
    return max(1, (m - 1).bit_length())


def octets(length: int, bits: int) -> int:
    """Bytes that hold `length` codes of `bits` bits."""
    return -(-length * bits // 8)


def meta_shape(n: int, m: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the positions' bytes of a weight (O, I)."""
    return shape[0], octets(shape[1] // m * n, position_bits(m))


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (R, L) of 0..2^bits-1, bool or uint8, as bytes (R, ceil(L*bits/8)), lowest bits first along a row."""
    return bitpack.pack(codes, bits).view(torch.uint8)[:, : octets(codes.shape[1], bits)].contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Codes (R, length) uint8 of bytes (R, ceil(length*bits/8))."""
    return bitpack.unpack(F.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32), bits, length)


def positions(mask: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Positions (O, I*n/m) uint8 of a mask (O, I) bool that has exactly n True in every group of m columns."""
    columns = torch.arange(m, dtype=torch.uint8, device=mask.device)
    pieces = []
    for kept in mask.reshape(-1, m).split(_PIECE // m):
        slots = kept.cumsum(1, dtype=torch.uint8).mul_(kept).to(torch.int64)  # 1..n, and 0 for what is pruned
        pieces.append(columns.new_empty(len(kept), n + 1).scatter_(1, slots, columns.expand_as(slots))[:, 1:])
    return torch.cat(pieces).view(len(mask), -1)


def unpack_positions(meta: torch.Tensor, n: int, m: int, inputs: int) -> torch.Tensor:
    """Positions (O, I*n/m) uint8 of the kept columns of a weight with `inputs` columns."""
    return unpack_codes(meta, position_bits(m), inputs // m * n)


def decode_positions(meta: torch.Tensor, n: int, m: int, inputs: int) -> torch.Tensor:
    """`unpack_positions`, faster."""
    return int_grouped.decode(meta, position_bits(m), inputs // m * n)


def gather(W: torch.Tensor, at: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The elements (R, I*n/m) of W (R, I) in the positions at (R, I*n/m)."""
    return W.reshape(-1, m).gather(1, at.reshape(-1, n).to(torch.int64)).view(at.shape)


def place(kept: torch.Tensor, at: torch.Tensor, n: int, m: int, out: torch.Tensor) -> torch.Tensor:
    """Write kept (R, I*n/m) to the positions at (R, I*n/m) of out (R, I), which is contiguous, and return it."""
    out.view(-1, m).scatter_(1, at.reshape(-1, n).to(torch.int64), kept.reshape(-1, n).to(out.dtype))
    return out


def scatter(kept: torch.Tensor, at: torch.Tensor, n: int, m: int, out: torch.Tensor) -> torch.Tensor:
    """`place`, and zeros everywhere else."""
    return place(kept, at, n, m, out.zero_())


def unfit(n: int, m: int, inputs: int) -> str | None:
    """None, or why n of every m of `inputs` columns cannot be kept."""
    if not 0 < n <= m <= LARGEST:
        return f"{n}:{m} is no pattern: N kept of every M, M at most {LARGEST}"
    return f"{inputs} inputs cannot be split into groups of {m}" if inputs % m else None


def misshapen(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> list[str]:
    """One problem where a tensor has another shape."""
    return [] if tensor.shape == shape else [f"{name} is {list(tensor.shape)}, wanted {list(shape)}"]


def not_finite(name: str, tensor: torch.Tensor) -> list[str]:
    """One problem where a tensor holds NaN or Inf."""
    return [] if bool(torch.isfinite(tensor).all()) else [f"{name} holds NaN or Inf"]


def position_problems(meta: torch.Tensor, n: int, m: int, shape: tuple[int, int]) -> list[str]:
    """What is wrong with the positions of a weight (O, I); empty where they can be used."""
    why = unfit(n, m, shape[1])
    found = [why] if why else misshapen("meta", meta, meta_shape(n, m, shape))
    if found:
        return found
    at = unpack_positions(meta, n, m, shape[1]).unflatten(1, (-1, n))
    wrong = (at >= m).any(-1) | (at[..., 1:] <= at[..., :-1]).any(-1)
    if not bool(wrong.any()):
        return []
    row, group = wrong.nonzero()[0].tolist()
    return [f"meta has positions {at[row, group].tolist()} in row {row}, group {group}: not {n} ascending ones below {m}"]


def refuse(problems: list[str], shape: tuple[int, int]) -> None:
    """Raise a ValueError that names what is wrong with a weight of `shape` (O, I)."""
    if problems:
        raise ValueError(f"weight of shape {shape[0]} x {shape[1]}: {'; '.join(problems)}")


@functools.cache
def _say_once(kind: str, path: str, why: str) -> None:
    held = "weights are held dense in memory" if path == DENSE else "weights are decoded on each call"
    logger.info("%s: the %s path runs, %s, not cpu: %s", kind, path, held, why)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One weight, ready to run."""

    path: str  # "cpu", "dense" or "tiled"
    weight: torch.Tensor | None = None  # "dense": (O, I) in the activations' dtype
    native: masked.Weight | None = None  # "cpu"
    parts: tuple[torch.Tensor | None, ...] = ()  # "tiled": the tensors that the kind's op takes between x and bias,
    sizes: tuple[int, ...] = ()  # and its numbers after the bias
    reasons: Mapping[str, str] = field(default_factory=dict)  # faster path -> why it cannot run

    @property
    def spare(self) -> bool:
        """Whether the artifact's tensors need not stay in memory."""
        return self.path != TILED


def choose(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, rows: int, decode: Decode, parts: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...], native: Callable[[], masked.Weight], unable: str | None = None, bits: int = 16,
) -> Prepared:  # fmt: skip
    """A weight (O, I) for the path that is best or that COMPRESS_BACKEND chooses.

    `decode` writes tiles of `rows` rows, `native` repacks for the C++ library unless it is `unable`. Where parts[0] is,
    is the weight.
    """
    assert parts[0] is not None
    chosen = backend(*PATHS)
    measured = chosen is None and unable != EXACT and parts[0].device.type == "cpu"
    best = dispatch.preferred(kind, bits, dtype, shape) if measured else None
    if chosen not in (None, CPU):
        why: str | None = f"COMPRESS_BACKEND is {chosen}"
    elif best in (DENSE, TILED):
        chosen, why = best, dispatch.TUNED.format(best)
    else:
        why = None if chosen == CPU and unable == EXACT else unable
        why = why or masked.can_run(dtype, parts[0].device)
    if why is None:
        return Prepared(CPU, native=native())
    chosen = TILED if chosen == TILED else DENSE
    _say_once(kind, chosen, why)
    if chosen == TILED:
        return Prepared(TILED, parts=parts, sizes=sizes, reasons={CPU: why})
    return Prepared(DENSE, whole(shape, rows, decode, dtype, parts[0].device), reasons={CPU: why})


def linear(op: Callable[..., torch.Tensor], x: torch.Tensor, p: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O) in x's dtype; `op` is the kind's own for the tiled path."""
    if p.native is not None:
        return masked.linear(x, p.native, bias)
    return op(x, *p.parts, bias, *p.sizes) if p.weight is None else F.linear(x, p.weight, bias)


def tiles(outputs: int, rows: int) -> Iterator[slice]:
    """Slices of `rows` of the output rows, the last one shorter."""
    for start in range(0, outputs, rows):
        yield slice(start, min(start + rows, outputs))


def whole(shape: tuple[int, int], rows: int, decode: Decode, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The dense weight (O, I), decoded by tiles straight into `dtype`."""
    W = torch.empty(shape, dtype=dtype, device=device)
    for tile in tiles(shape[0], rows):
        decode(tile, W[tile])
    return W


def product(x: torch.Tensor, outputs: int, rows: int, decode: Decode, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., I) times Wᵀ plus bias -> (..., O), with tiles of `rows` rows decoded into one scratch buffer of x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    scratch = x.new_empty(min(outputs, rows), x.shape[-1])
    out = x.new_empty(len(flat), outputs)
    for tile in tiles(outputs, rows):
        W = scratch[: tile.stop - tile.start]
        decode(tile, W)
        out[:, tile] = F.linear(flat, W, None if bias is None else bias[tile])
    return out.view(*x.shape[:-1], outputs)


def flags(at: torch.Tensor, n: int, m: int, inputs: int) -> torch.Tensor:
    """Mask (O, I) uint8 of 0 and 1 from positions (O, I*n/m)."""
    out = torch.zeros(len(at), inputs, dtype=torch.uint8, device=at.device)
    return place(torch.ones_like(at), at, n, m, out)

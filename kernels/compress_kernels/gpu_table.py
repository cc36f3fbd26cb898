"""Which way a GPU product of grouped integers goes, and in which blocks: read from a table per device, never tried out while
serving.

A table is a JSON file: `device`, and `rows` that `tune` measured on it, each of one width, group, shape and number of rows of
x, with the time of the fastest way (`us`) and that of the dense product (`dense_us`) in the same run. They are looked for in
COMPRESS_GPU_TABLE (a file), then in the user's cache folder, then in `configs/` of this package. A shape that no table has is
served by the rules in `configs/default.json`, which are reasoned and not measured.

Where a weight has a dense copy (`gpu_dense`), that is taken wherever the dense product was the faster one; so there no measured
number of rows is slower than dense. Without a copy the middle range (64 < M < some 4700) is as slow as decoding makes it.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a product."""

    path: str  # "fused": one launch; "scratch": the weight is decoded, then the vendor's product; "dense": that with a kept copy
    BM: int = 16  # rows of x per program
    BN: int = 128  # outputs per program: 64 or 128
    warps: int = 4
    stages: int = 4
    split: int = 1  # programs that share the columns
    slab: int = 24 << 20  # scratch: bytes decoded at a time; 0: the whole weight
    ahead: bool = False  # scratch: the next slab is decoded on a second stream while this one is multiplied


def slug(device: str) -> str:
    """A device's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def user_table(device: str) -> Path:
    """Where `gpu_tune` writes: COMPRESS_GPU_TABLE, or the user's cache folder."""
    chosen = os.environ.get("COMPRESS_GPU_TABLE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else cache / "llm-compress" / "gpu" / f"{slug(device)}.json"


def read(path: Path) -> dict[str, Any]:
    """A table's contents. Raises ValueError that names the file where it is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for row in table["rows"]:
            key(row)
            choice(row)
    except (KeyError, TypeError, ValueError) as error:
        hint = "remove it, or write it again with `compress bench tune`"
        raise ValueError(f"{path} is no table of GPU kernels ({error}): {hint}") from error
    return dict(table)


def key(row: dict[str, Any]) -> tuple[int, int, int, int]:
    """(bits, group, outputs, inputs) that a row is of; group 0: one scale per row."""
    return int(row["bits"]), int(row["group"]), int(row["O"]), int(row["I"])


def choice(row: dict[str, Any]) -> Choice:
    """The way that a row names. Raises ValueError where no kernel could run so."""
    named = {name: row[name] for name in Choice.__slots__ if name in row}
    c = Choice(**named)
    powers = {16, 32, 64, 128, 256}
    if c.path not in ("fused", "scratch") or c.BM not in powers or c.BN not in (64, 128) or c.warps not in (1, 2, 4, 8):
        raise ValueError(f"row {named} cannot be run")
    if not (1 <= c.stages <= 8 and 1 <= c.split <= 64 and c.slab >= 0 and isinstance(c.ahead, bool)):
        raise ValueError(f"row {named} cannot be run")
    return c


@functools.cache
def _tables(device: str, chosen: str | None) -> dict[tuple[int, int, int, int], list[tuple[int, Choice, bool]]]:
    """Measured rows of a device by their key: rows of x, in order, the way, and whether the dense product is faster.

    `chosen` is COMPRESS_GPU_TABLE, for the cache.
    """
    for path in (user_table(device), CONFIGS / f"{slug(device)}.json"):
        if path.is_file():
            found: dict[tuple[int, int, int, int], list[tuple[int, Choice, bool]]] = {}
            for row in read(path)["rows"]:
                slower = row.get("dense_us", 0.0) < row.get("us", 0.0)
                found.setdefault(key(row), []).append((int(row["M"]), choice(row), slower))
            return {k: sorted(rows, key=lambda r: r[0]) for k, rows in found.items()}
    return {}


@functools.cache
def _rules() -> list[dict[str, Any]]:
    return list(json.loads((CONFIGS / "default.json").read_text(encoding="utf-8"))["rules"])


def default(bits: int, shape: tuple[int, int], rows: int, units: int, shared: int = 227 << 10) -> Choice:
    """The rule for `rows` rows of x and a weight (O, I), on a GPU of `units` multiprocessors whose programs have `shared` bytes."""
    rule = next(r for r in _rules() if bits in r["bits"] and rows <= r["rows"])
    if rule["path"] == "scratch":
        return Choice("scratch")
    BM, BN = rule["BM"], rule["BN"]
    while BM > 16 and 2 * _stage(bits, BM, BN) > shared:
        BM //= 2
    programs = -(-shape[0] // BN) * -(-rows // BM)
    most = max(1, shape[1] // rule["least"])  # every program gets at least so many columns
    sums = 4 * min(rows, BM) / (shape[1] * bits / 8)  # bytes of a split's sums to those of its weights
    stages, warps = max(2, min(rule["stages"], shared // _stage(bits, BM, BN))), rule["warps"] if rule["BM"] == BM else 4
    return Choice("fused", BM, BN, warps, stages, _split(programs, units, min(most, rule["split"]), sums))


def _stage(bits: int, BM: int, BN: int) -> int:
    """Bytes of shared memory that a tile, the x for it and its statistics take at most."""
    columns = 256 if bits in (2, 3) else 128
    return columns * (BN * bits // 8 + 2 * BM) + 4 * BN * columns // 32


def _split(programs: int, units: int, most: int, sums: float) -> int:
    """Programs per tile for which the last wave of two per multiprocessor is fullest; each more costs `sums`, and its own start."""
    room = 2 * units

    def idle(split: int) -> float:
        waves = -(-programs * split // room)
        return 1 - programs * split / (waves * room) + (0.02 + sums) * (split - 1)

    return min(range(1, most + 1), key=idle)


@functools.cache
def _device(index: int | None) -> tuple[str, int, int]:
    """Name, multiprocessors and a program's bytes of shared memory of a CUDA device; None: the interpreter."""
    if index is None:
        return "interpreter", 8, 99 << 10
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 << 10)


def choose(bits: int, group: int, shape: tuple[int, int], rows: int, device: torch.device, kept: bool = False) -> Choice:
    """The way for `rows` rows of x and a weight (O, I): the measured row of as many rows or the next more, or the rule.

    `kept`: the weight has a dense copy. Beyond the last measured row that one holds, unless it says "fused".
    """
    index = (torch.cuda.current_device() if device.index is None else device.index) if device.type == "cuda" else None
    return _choose(bits, group, shape, rows, index, os.environ.get("COMPRESS_GPU_TABLE"), kept)


@functools.lru_cache(4096)
def _choose(
    bits: int, group: int, shape: tuple[int, int], rows: int, index: int | None, chosen: str | None, kept: bool
) -> Choice:  # fmt: skip
    name, units, shared = _device(index)
    measured = _tables(name, chosen).get((bits, group, *shape))
    row = measured and next((r for r in measured if rows <= r[0]), measured[-1])
    if row and (rows <= row[0] or row[1].path != "fused"):
        return Choice("dense") if kept and row[2] else row[1]
    way = default(bits, shape, rows, units, shared)
    return Choice("dense") if kept and way.path != "fused" else way


def candidates(bits: int, rows: int, quick: bool = False) -> list[Choice]:
    """Ways worth timing for `rows` rows of x; `quick`: half of them."""
    small = min(64, max(16, 1 << (rows - 1).bit_length()))
    out = []
    if rows <= 512:
        for BM in sorted({small, min(small, 32), 128 if rows > 64 else small}):
            for BN in (64, 128):
                for stages in ((4 if BM < 64 else 3,) if quick else (3, 4)):
                    splits: Sequence[int] = (1, 2, 4, 8) if rows <= 64 else (1,)
                    out += [Choice("fused", BM, BN, 8 if BM == 128 else 4, stages, split) for split in splits]
    if 128 < rows <= 1024:  # a weight is decoded once per 256 rows; 128 outputs of so many rows would spill
        out.append(Choice("fused", 256, 64, 8, 3))
    if rows > 64:
        out += [Choice("scratch", slab=slab) for slab in (12 << 20, 24 << 20, 0)]
        out += [Choice("scratch", slab=slab, ahead=True) for slab in (8 << 20, 16 << 20)]
    return out


def forget() -> None:
    """Read tables again at the next product."""
    _tables.cache_clear()
    _choose.cache_clear()

"""The C++ library for CPUs: found, loaded and described to ctypes. Without it everything runs, slower, in torch.

The package's build compiles it where a C++ compiler is there (setup.py). One file serves every CPU: it asks the machine for
its instruction set, and COMPRESS_ISA (one of ISAS) asks for a lower one. It is loaded after torch, so that both
share one OpenMP runtime and its threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from compress_kernels import BackendError

logger = logging.getLogger(__name__)

VERSION = 3
LIBRARY = Path(__file__).resolve().parent.parent / "_cpu.so"
ISAS = ("scalar", "avx2", "avx512", "avx512-bf16")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ERRORS = {
    1: "a shape it cannot run",
    2: "a dtype it does not know",
    3: "an instruction set this CPU lacks",
    4: "too small a workspace",
}
_SMALL = 1 << 20  # products below so many multiply-adds run on one thread
_KEPT = 1 << 22  # bytes of workspace that a thread keeps between products

_i32, _i64, _p = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class IntGrouped(ctypes.Structure):
    """`struct IntGrouped` of native/jobs.h."""

    _fields_ = (
        ("K", _i64), ("N", _i64), ("group", _i64), ("sub", _i64),
        ("bits", _i32), ("scale_type", _i32), ("exact", _i32), ("value_type", _i32),
        ("codes", _p), ("scale", _p), ("zero", _p), ("indptr", _p), ("index", _p), ("value", _p),
        ("step", _p), ("step_index", _p), ("step_value", _p), ("step_short", _i64),
    )  # fmt: skip


class Masked(ctypes.Structure):
    """`struct Masked` of native/jobs.h."""

    _fields_ = (
        ("K", _i64), ("N", _i64), ("group", _i64), ("value_type", _i32), ("unused", _i32),
        ("mask", _p), ("start", _p), ("values", _p), ("scale", _p), ("zero", _p),
    )  # fmt: skip


class Factors(ctypes.Structure):
    """`struct Factors` of native/jobs.h."""

    _fields_ = (
        ("K", _i64), ("N", _i64), ("rank", _i64), ("first", _i64), ("last", _i64), ("padded", _i64), ("joined", _i64),
        ("order", _p), ("A", _p), ("U", _p), ("coded_A", ctypes.POINTER(IntGrouped)), ("coded_U", ctypes.POINTER(IntGrouped)),
        ("silu", _i32), ("scaled", _i32), ("low", ctypes.c_float), ("direct", ctypes.c_float),
    )  # fmt: skip


class Shared(ctypes.Structure):
    """`struct SharedVector` of native/jobs.h."""

    _fields_ = (("kind", _i32), ("zero", _i32), ("group", _i64), ("values", _p), ("scale", _p))


class MaskedDelta(ctypes.Structure):
    """`struct MaskedDelta` of native/jobs.h."""

    _fields_ = (
        ("K", _i64), ("N", _i64), ("signs", _i32), ("has_low", _i32), ("base", _p), ("bias", _p), ("one", Shared), ("low", Shared),
        ("tasks", _i64), ("mask", ctypes.POINTER(_p)), ("factor", ctypes.POINTER(ctypes.c_float)), ("task", ctypes.POINTER(_i32)),
    )  # fmt: skip


class Armor(ctypes.Structure):
    """`struct Armor` of native/jobs.h."""

    _fields_ = (("block_in", _i64), ("block_out", _i64), ("pre", _p), ("post", _p), ("core", ctypes.POINTER(Masked)))


class Call(ctypes.Structure):
    """`struct Call` of native/jobs.h."""

    _fields_ = (
        ("M", _i64), ("stride", _i64), ("type", _i32), ("threads", _i32),
        ("x", _p), ("y", _p), ("workspace", _p), ("workspace_bytes", _i64),
        ("ready", _i32), ("unused", _i32),
    )  # fmt: skip


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return "it was not built when the package was installed (a C++ compiler with OpenMP is needed)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"it does not load: {error}"
    if library.cc_version() != VERSION:
        return f"it is version {library.cc_version()}, wanted {VERSION}: install the package again"
    to = ctypes.POINTER
    library.cc_int_grouped.argtypes = [ctypes.c_int, to(IntGrouped), to(Call)]
    library.cc_masked.argtypes = [ctypes.c_int, to(Masked), to(Call)]
    library.cc_factors.argtypes = [ctypes.c_int, to(Factors), to(Call)]
    library.cc_masked_delta.argtypes = [ctypes.c_int, to(MaskedDelta), to(Call)]
    library.cc_armor.argtypes = [ctypes.c_int, to(Armor), to(Call)]
    library.cc_masked_rows.argtypes = [ctypes.c_int, to(Masked), _i64, _i64, ctypes.c_int, _p, ctypes.c_int]
    return library


def missing() -> str | None:
    """None where the library can run, or the reason why not."""
    found = _load()
    return found if isinstance(found, str) else None


def loaded() -> ctypes.CDLL:
    """The library; only where nothing is `missing`."""
    library = _load()
    assert not isinstance(library, str), library
    return library


@functools.cache
def _isa(asked: str) -> int:
    library = loaded()
    have = int(library.cc_isa())
    if not asked:
        return have
    if asked not in ISAS:
        raise BackendError(f"COMPRESS_ISA is {asked!r}; there are {', '.join(ISAS)}")
    if ISAS.index(asked) > have:
        raise BackendError(f"COMPRESS_ISA is {asked!r}; this CPU has {ISAS[have]}")
    return ISAS.index(asked)


def isa() -> int:
    """The instruction set in use: index into ISAS."""
    return _isa(os.environ.get("COMPRESS_ISA", ""))


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers lie, for a ctypes field; None for None."""
    return None if tensor is None else tensor.data_ptr()


class _Space(threading.local):
    """A thread's workspace: asking torch for one takes as long as a small product."""

    def __init__(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.at = 0

    def get(self, size: int) -> tuple[int, torch.Tensor]:
        """Where `size` bytes lie, and the tensor that they belong to."""
        if size <= len(self.tensor):
            return self.at, self.tensor
        found = torch.empty(size, dtype=torch.uint8)
        if size <= _KEPT:
            self.tensor, self.at = found, found.data_ptr()
        return found.data_ptr(), found


_space = _Space()


def product(
    function: str, weight: ctypes.Structure, x: torch.Tensor, K: int, N: int, workspace: Callable[[int], int]
) -> torch.Tensor:
    """x (..., K) times Wᵀ -> (..., N) in x's dtype, by the library's `function`; `workspace` gives its bytes for M rows of x."""
    shape = x.shape
    if shape[-1] != K:
        raise ValueError(f"x has {shape[-1]} inputs, the weight has {K}")
    library = _load()
    assert not isinstance(library, str), library
    flat = x if len(shape) == 2 else x.reshape(-1, K)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    M = flat.shape[0]
    y = flat.new_empty((M, N))
    if M:
        size = workspace(M)
        at, _held = _space.get(size)
        threads = 1 if M * K * N < _SMALL else torch.get_num_threads()
        call = Call(M, flat.stride(0), TYPES[x.dtype], threads, flat.data_ptr(), y.data_ptr(), at, size)
        check(function, getattr(library, function)(isa(), weight, call))
    return y if len(shape) == 2 else y.view(*shape[:-1], N)


def masked_rows(weight: ctypes.Structure, first: int, out: torch.Tensor) -> None:
    """Write the rows from `first` on of a `Masked` weight into out (R, I), which is contiguous."""
    library = _load()
    assert not isinstance(library, str), library
    threads = 1 if out.numel() < _SMALL else torch.get_num_threads()
    place = first, len(out), TYPES[out.dtype], out.data_ptr(), threads
    check("cc_masked_rows", library.cc_masked_rows(isa(), weight, *place))


def check(function: str, code: int) -> None:
    """Raise what an entry point's code says."""
    if code:
        raise RuntimeError(f"{function}: {ERRORS.get(code, f'error {code}')}")

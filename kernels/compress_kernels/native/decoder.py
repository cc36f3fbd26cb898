"""The library's `cc_decode` as ctypes sees it: one token through a whole model (block/cpu.cpp)."""

from __future__ import annotations

import ctypes
import functools

from compress_kernels import native

INTS, MASKED, DENSE, FACTORS, ARMOR, DELTA = range(1, 7)  # kinds of a Linear

_f32, _i32, _i64, _p = ctypes.c_float, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Linear(ctypes.Structure):
    """`struct Linear` of native/jobs.h."""

    _fields_ = (
        ("K", _i64), ("N", _i64), ("kind", _i32), ("type", _i32), ("bias_type", _i32), ("unused", _i32),
        ("weight", _p), ("bias", _p),
    )  # fmt: skip


class Block(ctypes.Structure):
    """`struct Block` of native/jobs.h."""

    _fields_ = (
        ("norm_in", _p), ("norm_mid", _p), ("norm_q", _p), ("norm_k", _p), ("q", Linear), ("k", Linear), ("v", Linear),
        ("o", Linear), ("gate", Linear), ("up", Linear), ("down", Linear),
    )  # fmt: skip


class Decoder(ctypes.Structure):
    """`struct Decoder` of native/jobs.h."""

    _fields_ = (
        ("blocks", _i64), ("D", _i64), ("inner", _i64), ("heads", _i64), ("kv_heads", _i64), ("head_dim", _i64), ("eps", _f32),
        ("scale", _f32), ("norm_type", _i32), ("cache_type", _i32), ("block", _p), ("norm", _p), ("head", Linear),
    )  # fmt: skip


class Step(ctypes.Structure):
    """`struct Step` of native/jobs.h."""

    _fields_ = (
        ("B", _i64), ("slot", _i64), ("capacity", _i64), ("type", _i32), ("threads", _i32), ("x", _p), ("cache", _p), ("first", _p),
        ("cos", _p), ("sin", _p), ("y", _p), ("workspace", _p), ("workspace_bytes", _i64),
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The library with this file's functions declared; only where `native.missing()` is None."""
    found = native.loaded()
    to = ctypes.POINTER
    found.cc_decode.argtypes = [ctypes.c_int, to(Decoder), to(Step)]
    found.cc_decode_bytes.argtypes = [ctypes.c_int, to(Decoder), to(Step)]
    found.cc_decode_bytes.restype = _i64
    return found

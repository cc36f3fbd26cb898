"""The C++ kernels under AddressSanitizer and UBSan: random shapes, every instruction set, buffers of just their size."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compress_kernels import native
from compress_kernels.native import decoder
from conftest import ROOT

SANITIZED = """
import ctypes, random, sys
sys.path.insert(0, sys.argv[2])
from structures import Armor, Block, Call, Decoder, Factors, IntGrouped, Linear, Masked, MaskedDelta, Shared, Step
library = ctypes.CDLL(sys.argv[1])
draw = random.Random(0)

def buffer(size):  # of just that size, so that one byte beyond is noticed
    return ctypes.create_string_buffer(bytes(draw.randrange(64) for _ in range(size)), size)

def at(b):
    return ctypes.cast(b, ctypes.c_void_p) if b is not None else None

size = {0: 4, 1: 2, 2: 2}
for step in range(120):
    isa, M, x_type, scale_type = draw.randrange(library.cc_isa() + 1), draw.randrange(0, 19), draw.randrange(3), draw.randrange(3)
    N, exact = draw.randrange(1, 40), draw.randrange(2)
    bits, group = draw.choice([(2, 16), (3, 32), (4, 48), (8, 24), (4, 128)])
    K = group * draw.randrange(1, 4)
    tiles, groups = -(-N // 16), K // group
    codes, scale = buffer(tiles * 16 * K * bits // 8), buffer(tiles * groups * 16 * size[scale_type])
    zero = buffer(tiles * groups * 16) if draw.randrange(2) else None
    sub = group if group <= 128 else 128
    x, y = buffer(M * K * size[x_type]), buffer(M * N * size[x_type])
    steps, short = [0], draw.randrange(2)
    for _ in range(tiles):
        steps.append(steps[-1] + draw.randrange(4))
    columns = [draw.randrange(K) for _ in range(16 * steps[-1])]
    step, width = (ctypes.c_int64 * (tiles + 1))(*steps), ctypes.c_uint16 if short else ctypes.c_int32
    step_index = (width * len(columns))(*columns)
    step_value = buffer(32 * steps[-1])
    space = M * (4 * (groups if exact else 2 * (K // sub)) + K * (4 if exact else 1))
    if draw.randrange(2):
        space = -(-space // 64) * 64 + 4 * K * (-(-M // 16) * 16 if M > 1 else 1)
    else:
        step = None
    work = buffer(space)
    indptr = (ctypes.c_int64 * (N + 1))(*range(N + 1))
    index = (ctypes.c_int32 * N)(*(draw.randrange(K) for _ in range(N)))
    w = IntGrouped(K, N, group, sub, bits, scale_type, exact, 1, at(codes), at(scale), at(zero), at(indptr), at(index),
                   at(buffer(2 * N)), at(step), at(step_index), at(step_value), short)
    assert library.cc_int_grouped(isa, ctypes.byref(w), ctypes.byref(Call(M, K, x_type, 2, at(x), at(y), at(work), space))) == 0

    K = draw.randrange(1, 80)
    stride = -(-K // 32) * 32
    kept = [[draw.randrange(2) if k < K else 0 for k in range(stride)] for _ in range(N)]
    mask = (ctypes.c_uint8 * (N * stride // 8))(
        *(sum(row[8 * i + b] << b for b in range(8)) for row in kept for i in range(stride // 8)))
    start = [0]
    for row in kept:
        start.append(start[-1] + sum(row))
    starts, values = (ctypes.c_int64 * (N + 1))(*start), buffer((start[-1] + 32) * size[scale_type])
    space = max(4 * M * stride, -(-M // 16) * (32 * stride + 64))
    x, y, work = buffer(M * K * size[x_type]), buffer(M * N * size[x_type]), buffer(space)
    m = Masked(K, N, 0, scale_type, 0, at(mask), at(starts), at(values), None, None)
    assert library.cc_masked(isa, ctypes.byref(m), ctypes.byref(Call(M, K, x_type, 2, at(x), at(y), at(work), space))) == 0
    out = buffer(N * K * size[x_type])
    assert library.cc_masked_rows(isa, ctypes.byref(m), ctypes.c_int64(0), ctypes.c_int64(N), x_type, at(out), 2) == 0
    K = 16 * draw.randrange(1, 5)
    row = -(-K // 32) * 4
    mask = (ctypes.c_uint8 * (N * row))(*(0b01010011 if i % row < K // 8 else 0 for i in range(N * row)))
    scale, codes, x = buffer(N * size[scale_type]), buffer(N * K // 4 + 32), buffer(M * K * size[x_type])
    m = Masked(K, N, K, scale_type, 0, at(mask), None, at(codes), at(scale), None)
    space = max(4 * M * K, -(-M // 16) * (32 * (row * 8) + 64))
    work, out = buffer(space), buffer(N * K * size[x_type])
    assert library.cc_masked(isa, ctypes.byref(m), ctypes.byref(Call(M, K, x_type, 2, at(x), at(y), at(work), space))) == 0
    assert library.cc_masked_rows(isa, ctypes.byref(m), ctypes.c_int64(0), ctypes.c_int64(N), x_type, at(out), 1) == 0

    # both diagonals around the core of before
    b_in, b_out = draw.choice([k for k in range(1, K + 1) if K % k == 0]), draw.choice([n for n in range(1, N + 1) if N % n == 0])
    pre, post = buffer(K * b_in * size[x_type]), buffer(N * b_out * size[x_type])
    space = sum(-(-M * n * size[x_type] // 64) * 64 for n in (K, N)) + 4 * (M + 16) * (-(-max(K, N) // 32) * 32 + 32)
    work = buffer(space)
    a = Armor(b_in, b_out, at(pre), at(post), ctypes.pointer(m))
    assert library.cc_armor(isa, ctypes.byref(a), ctypes.byref(Call(M, K, x_type, 2, at(x), at(y), at(work), space))) == 0

    # factors, plain and coded
    K, rank = draw.randrange(2, 90), draw.randrange(0, 9)
    last = draw.randrange(0 if rank else 1, K)
    first = K - last
    order = (ctypes.c_int32 * K)(*draw.sample(range(K), K)) if draw.randrange(2) else None
    A, U = buffer(rank * first * size[x_type]), buffer(N * (rank + last) * size[x_type])
    x = buffer(M * K * size[x_type])
    space = sum(-(-M * n * 4 // 64) * 64 for n in (first, rank + last))
    work = buffer(space)
    f = Factors(K, N, rank, first if rank else 0, last, first if rank else 0, rank + last, at(order), at(A), at(U), None, None,
                draw.randrange(2), draw.randrange(2), 0.3, 0.7)
    assert library.cc_factors(isa, ctypes.byref(f), ctypes.byref(Call(M, K, x_type, 2, at(x), at(y), at(work), space))) == 0
    inner, outer = -(-first // 32) * 32, -(-(rank + last) // 32) * 32
    ints, kept = [], []
    for n, k in ((rank, inner), (N, outer)):
        codes, scale = buffer(-(-n // 16) * 16 * k // 2), buffer(-(-n // 16) * 16 * (k // 32) * 2)
        kept += [codes, scale]
        ints.append(IntGrouped(k, n, 32, 32, 4, 1, exact, 0, at(codes), at(scale), None, None, None, None))
    own = max(M * (4 * (w.K // 32 + w.K) if exact else 8 * (w.K // 32) + w.K) for w in ints)
    space = sum(-(-M * n * size[x_type] // 64) * 64 for n in (inner if rank else 0, outer, rank)) + -(-own // 64) * 64
    work = buffer(space)
    f = Factors(K, N, rank, first if rank else 0, last, inner if rank else 0, outer, at(order), None, None,
                ctypes.pointer(ints[0]) if rank else None, ctypes.pointer(ints[1]), 0, 0, 0, 0)
    assert library.cc_factors(isa, ctypes.byref(f), ctypes.byref(Call(M, K, x_type, 2, at(x), at(y), at(work), space))) == 0

    # deltas of three tasks
    base, bias = buffer(N * K * size[x_type]), buffer(N * size[x_type]) if draw.randrange(2) else None
    def vector():
        kind = draw.randrange(4)
        group = draw.choice([k for k in range(1, K + 1) if K % k == 0])
        values = buffer([N * K * 2, N * (-(-K // 4) * 4), N * (-(-K // 8) * 4), 4][kind])
        scale = buffer(N * (K // group) * 2)
        kept.extend([values, scale])
        return Shared(kind, draw.choice([0, 128 if kind == 1 else 8]), group, at(values), at(scale))
    masks = [buffer(N * -(-K // 32) * 4) for _ in range(3)]
    tasks = (ctypes.c_int32 * M)(*draw.choice([[draw.randrange(3)] * M, [draw.randrange(-1, 3) for _ in range(M)]]))
    d = MaskedDelta(K, N, draw.randrange(2), draw.randrange(2), at(base), at(bias), vector(), vector(), 3,
                    (ctypes.c_void_p * 3)(*(ctypes.addressof(mask) for mask in masks)), (ctypes.c_float * 3)(0.5, 1, 2), tasks)
    space = 8 * M + 64 + 4 * M * (-(-K // 32) * 32 + 32)
    work = buffer(space)
    assert library.cc_masked_delta(isa, ctypes.byref(d), ctypes.byref(Call(M, K, x_type, 2, at(x), at(y), at(work), space))) == 0

library.cc_decode_bytes.restype = ctypes.c_int64
for step in range(40):
    isa, B, head, kv, d, D = draw.randrange(library.cc_isa() + 1), draw.randrange(1, 4), 4, draw.choice([1, 2, 4]), 16, 32
    capacity, cache_type, inner, outputs = draw.randrange(1, 30), draw.randrange(3), 48, 33
    kept = []

    def held(size):
        kept.append(buffer(size))
        return at(kept[-1])

    def dense(N, K):
        kind = draw.randrange(3)
        return Linear(K, N, 3, kind, 1, 0, held(N * K * size[kind]), held(2 * N) if draw.randrange(2) else None)

    def coded(N, K):
        tiles = -(-N // 16)
        steps = (ctypes.c_int64 * (tiles + 1))(*range(tiles + 1)) if draw.randrange(2) else None
        columns = (ctypes.c_uint16 * (16 * tiles))(*(draw.randrange(K) for _ in range(16 * tiles)))
        kept.extend([steps, columns])
        parts = held(tiles * 8 * K), held(tiles * K // 16 * 32), None, None, None, None, at(steps), at(columns), held(32 * tiles), 1
        w = IntGrouped(K, N, 16, 16, 4, 1, draw.randrange(2), 1, *parts)
        kept.append(w)
        return Linear(K, N, 1, 0, 0, 0, ctypes.cast(ctypes.pointer(w), ctypes.c_void_p), None)

    def stepwise(kind, N, K, type, weight):
        kept.append(weight)
        return Linear(K, N, kind, type, 0, 0, ctypes.cast(ctypes.pointer(weight), ctypes.c_void_p), None)

    def ints(N, K):
        w = IntGrouped(K, N, 16, 16, 4, 1, draw.randrange(2), 1, held(-(-N // 16) * 8 * K), held(-(-N // 16) * K // 16 * 32))
        kept.append(w)
        return ctypes.pointer(w)

    def factored(N, K):
        rank, last, type = draw.choice([0, 5, 19]), K // 4 + 1, draw.randrange(3)
        first = K - last if rank else 0
        order = (ctypes.c_int32 * K)(*draw.sample(range(K), K)) if draw.randrange(2) else None
        kept.append(order)
        inner, outer = (-(-n // 16) * 16 for n in (first, rank + last))
        if draw.randrange(2):
            parts = inner, outer, at(order), None, None, ints(rank, inner) if rank else None, ints(N, outer)
        else:
            plain = held(rank * first * size[type]), held(N * (rank + last) * size[type])
            parts = first, rank + last, at(order), *plain, None, None
        f = Factors(K, N, rank, first, last, *parts, draw.randrange(2), draw.randrange(2), 0.3, 0.7)
        return stepwise(4, N, K, type, f)

    def wrapped(N, K):
        type, stride = draw.randrange(3), -(-K // 32) * 4
        half = [0b01010011 if 8 * (i % stride) < K else 0 for i in range(N * stride)]
        starts = (ctypes.c_int64 * (N + 1))(*(n * K // 2 for n in range(N + 1)))
        core = Masked(K, N, 0, type, 0, held(0), at(starts), held((N * K // 2 + 32) * size[type]), None, None)
        mask = (ctypes.c_uint8 * len(half))(*half)
        core.mask = at(mask)
        kept.extend([starts, core, mask])
        b_in, b_out = (draw.choice([b for b in range(1, n + 1) if n % b == 0]) for n in (K, N))
        a = Armor(b_in, b_out, held(K * b_in * size[type]), held(N * b_out * size[type]), ctypes.pointer(core))
        return stepwise(5, N, K, type, a)

    def delta(N, K):
        type = draw.randrange(3)
        def vector():
            kind = draw.randrange(4)
            values = held([N * K * 2, N * (-(-K // 4) * 4), N * (-(-K // 8) * 4), 4][kind])
            return Shared(kind, draw.choice([0, 128 if kind == 1 else 8]), 16, values, held(N * (K // 16) * 2))
        mask = (ctypes.c_void_p * 1)(held(N * -(-K // 32) * 4).value)
        factor, tasks = (ctypes.c_float * 1)(0.5), (ctypes.c_int32 * 3)()
        kept.extend([mask, factor, tasks])
        base, parts = held(N * K * size[type]), (vector(), vector())
        d = MaskedDelta(K, N, draw.randrange(2), draw.randrange(2), base, None, *parts, 1, mask, factor, tasks)
        return stepwise(6, N, K, type, d)

    def some(N, K):
        return draw.choice([dense, coded, factored, wrapped, delta])(N, K)

    shapes = (head * d, D), (kv * d, D), (kv * d, D), (D, head * d), (inner, D), (inner, D), (D, inner)
    norms = 2 * D, 2 * D, 2 * d, 2 * d
    blocks = (Block * 2)(*(Block(*map(held, norms), *(some(*shape) for shape in shapes)) for _ in range(2)))
    table = ctypes.cast(blocks, ctypes.c_void_p)
    whole = Decoder(2, D, inner, head, kv, d, 1e-5, 0.25, 1, cache_type, table, held(2 * D), some(outputs, D))
    assert library.cc_decode(isa, ctypes.byref(whole), ctypes.byref(Step())) == 0
    cache = (ctypes.c_void_p * 2)(*(held(2 * B * kv * capacity * d * size[cache_type]).value for _ in range(2)))
    slot = draw.randrange(capacity)
    first = (ctypes.c_int64 * B)(*(draw.randrange(slot + 1) for _ in range(B)))
    one = Step(B, slot, capacity, 1, draw.randrange(1, 4), held(2 * B * D), ctypes.cast(cache, ctypes.c_void_p),
               ctypes.cast(first, ctypes.c_void_p), held(2 * B * d), held(2 * B * d), held(4 * B * outputs))
    one.workspace_bytes = library.cc_decode_bytes(isa, ctypes.byref(whole), ctypes.byref(one))
    one.workspace = held(one.workspace_bytes)
    assert library.cc_decode(isa, ctypes.byref(whole), ctypes.byref(one)) == 0
print("whole")
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("c++") is None, reason="needs a Linux C++ compiler")
def test_no_byte_outside_is_touched_under_the_sanitizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("setup_for_kernels", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setenv("CC_SANITIZE", "1")
    build.compile_library(tmp_path / "_cpu.so", tmp_path / "objects")
    source = Path(native.__file__).read_text()
    structures = source[source.index("_i32, _i64") : source.index("@functools")]
    source = Path(decoder.__file__).read_text()
    structures += source[source.index("_f32, _i32") : source.index("@functools")]
    (tmp_path / "structures.py").write_text(f"import ctypes\n{structures}")
    preload = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {**os.environ, "LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    args = [sys.executable, "-c", SANITIZED, str(tmp_path / "_cpu.so"), str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "whole" in done.stdout

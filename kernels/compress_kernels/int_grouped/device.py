"""Device code of grouped integers, for Triton's compiler: the product y = x Wᵀ, and W itself for long inputs. Imports triton only.

A weight lies in tiles of TILE = 128 rows and KB columns, each one contiguous: `[tiles][KT][planes][128][W]` words of 16 bits. A
word holds one code of each of a row's fields, W columns apart: field i of word j is column i·W + j. So a field is a matrix
(rows, W) of its own with its own dot, no lane ever moves, and decoded weights stay in the registers that the tensor cores read:
they are the dot's left operand.

    2 bits   KB 256, W 32   8 fields at bits 0, 2, … 14
    3 bits   KB 256, W 16   3 planes of 5 fields at bits 0, 3, … 12; field 15 is spread over the planes' top bits
    4 bits   KB 128, W 32   4 fields
    8 bits   KB 128, W 64   2 fields (groups of 32: KB 64, W 32)

A code of w bits at bit b, OR'ed into the bits of a power of two whose unit in the last place is 2^-b, is the number base + q
(fp16: base 2^(10-b), b + w <= 10; bf16: 2^(7-b), b + w <= 7). Subtracting base + z is exact, and two lanes take one instruction
each for both. 8 bits do not fit bf16's 7: these codes go through fp16 and fp32. The scale multiplies the group's fp32 sum, so
no weight is rounded.

A group's statistics are one word of 32 bits, z above and the 16-bit scale below (z = 2^(bits-1) where symmetric): loads of 32
bits that a dot depends on are what Triton copies ahead of the loop; 16-bit ones would be waited for in every turn. fp32 scales
(WIDE) lie beside the words.

DECODE 0 is that as inline assembly; 1 the same in plain Triton and fp16, for the interpreter; 2 in fp32, for fp32 activations
and for bf16 in the interpreter, whose bf16 arithmetic is wrong.
"""

# mypy: ignore-errors
# ruff: noqa: SIM108 (a kernel's branches are decided by its compiler)
import triton
import triton.language as tl

TILE = tl.constexpr(128)
STEP = tl.constexpr(8)  # outliers of a row that lie together
RUN = tl.constexpr(256)  # outliers of a long row that lie together
EMPTY = tl.constexpr(-0x80000000)  # the word of no outlier: -0.0 in column 0


@triton.constexpr_function
def columns(bits, group):
    """Columns of a tile; `group` is 0 where a row has one scale."""
    if bits in (2, 3):
        return 256
    return 64 if bits == 8 and group == 32 else 128


@triton.constexpr_function
def fields(bits):
    """Codes per word, those of field 15 of 3 bits counted too."""
    return {2: 8, 3: 16, 4: 4, 8: 2}[bits]


@triton.constexpr_function
def planes(bits):
    """Words of 16 bits that a column of words takes."""
    return 3 if bits == 3 else 1


@triton.constexpr_function
def _place(bits, i, bf16):
    """(plane, right shift, bit) of field i."""
    if bits == 8:
        return 0, 8 * i, 0
    if bits == 4:
        return (0, 4 * i, 0) if bf16 else (0, 8 * (i // 2), 4 * (i % 2))
    if bits == 2:
        return (0, 6 * (i // 3), 2 * (i % 3)) if bf16 else (0, 8 * (i // 4), 2 * (i % 4))
    plane, f = divmod(i, 5)
    if bf16:
        return plane, (0, 0, 6, 6, 12)[f], (0, 3, 0, 3, 0)[f]
    return plane, (0, 0, 0, 9, 9)[f], (0, 3, 6, 0, 3)[f]


@triton.constexpr_function
def _magic(bit, bf16):
    """The 16 bits whose number has the unit 2^-bit in its last place."""
    return 0x4300 - (bit << 7) if bf16 else 0x6400 - (bit << 10)


@triton.constexpr_function
def plane_of(bits, i):
    """The plane that holds field i; 0 for field 15 of 3 bits, which all three hold."""
    return _place(bits, i, False)[0] if i < 15 else 0


@triton.constexpr_function
def shift_of(bits, i):
    """Right shift before field i's mask, in fp16."""
    return _place(bits, i, False)[1]


@triton.constexpr_function
def bit_of(bits, i, bf16):
    """The bit at which field i is OR'ed into a number."""
    return 0 if i == 15 else _place(bits, i, bf16 and bits != 8)[2]


@triton.constexpr_function
def magic_of(bits, i, bf16):
    """The 16 bits of field i's base."""
    return _magic(bit_of(bits, i, bf16), bf16 and bits != 8)


@triton.constexpr_function
def base_of(bits, i, bf16):
    """What field i's number is larger by than its code."""
    return 2 ** ((7 if bf16 and bits != 8 else 10) - bit_of(bits, i, bf16))


@triton.constexpr_function
def assembly(bits, i, bf16):
    """PTX that decodes field i of two words: $0 = base + q - $n, $n = -(base + z) the last operand, before it the planes."""
    wide, bf16 = bf16 and bits == 8, bf16 and bits != 8
    shift, bit = (0, 0) if i == 15 else _place(bits, i, bf16)[1:]
    text = f"{{ .reg .b32 t, c; .reg .b16 h, k; .reg .f32 f, g; mov.b32 c, {_magic(bit, bf16) * 0x10001}; "
    if i == 15:
        for p in range(3):
            text += f"shr.b32 t, ${p + 1}, {15 - p}; lop3.b32 c, t, {0x10001 << p}, c, 0xEA; "
        text += "mov.b32 t, c; "
    else:
        text += f"shr.b32 t, $1, {shift}; lop3.b32 t, t, {((1 << bits) - 1 << bit) * 0x10001}, c, 0xEA; "
    offset = "$4" if i == 15 else "$2"
    if bf16:
        return text + f"mov.b32 c, {0x3F803F80}; fma.rn.bf16x2 $0, t, c, {offset}; }}"
    if wide:
        text += f"add.rn.f16x2 t, t, {offset}; mov.b32 {{h, k}}, t; "
        return text + "cvt.f32.f16 f, h; cvt.f32.f16 g, k; cvt.rn.bf16x2.f32 $0, g, f; }"
    return text + f"add.rn.f16x2 $0, t, {offset}; }}"


@triton.jit
def _code(w, p, r, BITS: tl.constexpr, I: tl.constexpr):
    """Codes of field I as int16, from the planes w, p, r."""
    if I == 15:
        q = ((w >> 15) & 1) | ((p >> 14) & 2) | ((r >> 13) & 4)
    else:
        q = (w >> (shift_of(BITS, I) + bit_of(BITS, I, False))) & ((1 << BITS) - 1)
    return q


@triton.jit
def _offset(z, BITS: tl.constexpr, I: tl.constexpr, BF16: tl.constexpr):
    """-(base + z) of field I (rows, 1) as the 16 bits that its number is in."""
    minus = -z.to(tl.float32)
    if BF16 and BITS != 8:
        below = minus.to(tl.bfloat16) - base_of(BITS, I, BF16)
    else:
        below = minus.to(tl.float16) - base_of(BITS, I, BF16)
    return below[:, None]


@triton.jit
def field(w, p, r, z, BITS: tl.constexpr, I: tl.constexpr, DECODE: tl.constexpr, BF16: tl.constexpr):
    """q - z of field I (rows, W), exactly. w, p, r: the planes of words; z (rows,) int32."""
    if I == 15 or plane_of(BITS, I) == 0:
        a = w
    elif plane_of(BITS, I) == 1:
        a = p
    else:
        a = r
    if DECODE == 2:
        number = _code(a, p, r, BITS, I).to(tl.float32) - z.to(tl.float32)[:, None]
    elif DECODE == 1:
        if I == 15:
            lanes = _code(a, p, r, BITS, I) | 0x6400
        else:
            lanes = ((a >> shift_of(BITS, I)) & (((1 << BITS) - 1) << bit_of(BITS, I, False))) | magic_of(BITS, I, False)
        number = lanes.to(tl.int16).to(tl.float16, bitcast=True) + _offset(z, BITS, I, False)
    else:
        TEXT: tl.constexpr = assembly(BITS, I, BF16)
        below = _offset(z, BITS, I, BF16)
        if I == 15:
            lanes = tl.inline_asm_elementwise(TEXT, "=r,r,r,r,r", [w, p, r, below], tl.int16, is_pure=True, pack=2)
        else:
            lanes = tl.inline_asm_elementwise(TEXT, "=r,r,r", [a, below], tl.int16, is_pure=True, pack=2)
        if BF16:
            number = lanes.to(tl.bfloat16, bitcast=True)
        else:
            number = lanes.to(tl.float16, bitcast=True)
    return number


@triton.jit
def statistics(word_ptr, scale_ptr, at, WIDE: tl.constexpr, BF16_SCALES: tl.constexpr):
    """Scale (rows,) fp32 and zero point (rows,) int32 of a group."""
    word = tl.load(word_ptr + at)
    if WIDE:
        s = tl.load(scale_ptr + at)
    elif BF16_SCALES:
        s = (word << 16).to(tl.float32, bitcast=True)
    else:
        s = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return s, (word >> 16) & 0xFF


@triton.jit
def _column_and_value(entry, BF16_VALUES: tl.constexpr):
    """An outlier's word: the column in the low 16 bits, the value's own 16 bits above."""
    if BF16_VALUES:
        value = (entry & -0x10000).to(tl.float32, bitcast=True)
    else:
        value = (entry >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return entry & 0xFFFF, value


@triton.jit
def _outliers(acc, x_ptr, stride_x, xt_ptr, stride_t, M, tile_m, starts_ptr, entries_ptr, run_starts_ptr, run_rows_ptr,
              runs_ptr, tile, shift, split, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, OUTLIERS: tl.constexpr,
              BF16_VALUES: tl.constexpr):  # fmt: skip
    """acc (BN, BM) plus this split's share of the outliers of the rows from `shift` on, times block tile_m of x."""
    rows, ms = tl.arange(0, BN), tl.arange(0, BM)
    first_row, live = tile_m * BM, tl.minimum(M - tile_m * BM, BM)
    end = tl.load(starts_ptr + tile + 1)
    for c in range(tl.load(starts_ptr + tile) + split, end, SPLIT):
        at = entries_ptr + (rows + shift + c * TILE) * STEP
        if OUTLIERS == 1:  # few rows of x: one after the other
            entry = tl.load(at[:, None] + tl.arange(0, STEP)[None, :])
            column, value = _column_and_value(entry, BF16_VALUES)
            for m in range(live):
                seen = tl.load(x_ptr + (first_row + m) * stride_x + column, mask=entry != EMPTY, other=0.0).to(tl.float32)
                acc += tl.where(ms[None, :] == m, tl.sum(seen * value, 1)[:, None], 0.0)
        else:  # many: xᵀ, whose rows lie together
            for j in tl.static_range(STEP):
                entry = tl.load(at + j)
                column, value = _column_and_value(entry, BF16_VALUES)
                spot = xt_ptr + column[:, None] * stride_t + first_row + ms[None, :]
                acc += tl.load(spot, mask=(entry != EMPTY)[:, None], other=0.0).to(tl.float32) * value[:, None]
    end = tl.load(run_starts_ptr + tile + 1)
    for c in range(tl.load(run_starts_ptr + tile) + split, end, SPLIT):
        row = tl.load(run_rows_ptr + c) - shift
        entry = tl.load(runs_ptr + c * RUN + tl.arange(0, RUN))
        column, value = _column_and_value(entry, BF16_VALUES)
        if OUTLIERS == 1:
            for m in range(live):
                seen = tl.load(x_ptr + (first_row + m) * stride_x + column, mask=entry != EMPTY, other=0.0).to(tl.float32)
                acc += tl.where((rows == row)[:, None] & (ms == m)[None, :], tl.sum(seen * value, 0), 0.0)
        else:
            spot = xt_ptr + column[:, None] * stride_t + first_row + ms[None, :]
            seen = tl.load(spot, mask=(entry != EMPTY)[:, None], other=0.0).to(tl.float32)
            acc += tl.where((rows == row)[:, None], tl.sum(seen * value[:, None], 0)[None, :], 0.0)
    return acc


@triton.jit
def _store(acc, bias_ptr, y_at, work_ptr, locks_ptr, place, split, real_n, real_m, n,
           BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Write the sums acc (BN, BM) of one split of block `place` to y_at (BN, BM), plus the other splits' and the bias."""
    if SPLIT == 1:
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=real_n, other=0.0).to(tl.float32)[:, None]
        tl.store(y_at, acc.to(y_at.dtype.element_ty), mask=real_n[:, None] & real_m[None, :])
    else:
        work_at = work_ptr + place * (SPLIT * BN * BM) + tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
        tl.store(work_at + split * (BN * BM), acc, mask=real_m[None, :])
        tl.debug_barrier()  # every thread's sums are written before one thread says so
        if tl.atomic_add(locks_ptr + place, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            tl.store(locks_ptr + place, 0)
            total = tl.zeros((BN, BM), tl.float32)
            for s in range(SPLIT):
                total += tl.load(work_at + s * (BN * BM), mask=real_m[None, :], other=0.0, cache_modifier=".cg")
            if BIAS:
                total += tl.load(bias_ptr + n, mask=real_n, other=0.0).to(tl.float32)[:, None]
            tl.store(y_at, total.to(y_at.dtype.element_ty), mask=real_n[:, None] & real_m[None, :])


@triton.jit(do_not_specialize=("M", "KT"))  # one program for every number of rows of x
def product(x_ptr, words_ptr, stats_ptr, scale_ptr, bias_ptr, y_ptr, work_ptr, locks_ptr,
            xt_ptr, starts_ptr, entries_ptr, run_starts_ptr, run_rows_ptr, runs_ptr,
            M, N, NP, K, KT, stride_x, stride_y, stride_t,
            BITS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BF16_SCALES: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
            BIAS: tl.constexpr, OUTLIERS: tl.constexpr, BF16_VALUES: tl.constexpr, DECODE: tl.constexpr):  # fmt: skip
    """y (M, N) = x (M, K) Wᵀ + bias. Grid: (ceil(N / 128) · 128 / BN, ceil(M / BM), SPLIT); GROUP 0: one scale per row.

    Statistics of two groups lie NP apart. The splits of K write their sums to `work`; the one that arrives last, told by a counter
    of `locks`, adds them in their order, so the result does not depend on who was last, and sets the counter back to 0.
    """
    KB: tl.constexpr = columns(BITS, GROUP)
    F: tl.constexpr = fields(BITS)
    P: tl.constexpr = planes(BITS)
    W: tl.constexpr = KB // F
    SPAN: tl.constexpr = F if GROUP == 0 else GROUP // W  # fields of a group
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    block, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile, shift = block * BN // TILE, block * BN % TILE
    rows, ms, ws = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, W)
    n, m = block * BN + rows, tile_m * BM + ms
    x_at, real = x_ptr + m[None, :] * stride_x + ws[:, None], m[None, :] < M
    words_at = words_ptr + (shift + rows)[:, None] * W + ws[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    share = (KT + SPLIT - 1) // SPLIT
    if GROUP == 0:
        s, z = statistics(stats_ptr, scale_ptr, n, WIDE, BF16_SCALES)
    for t in range(split * share, tl.minimum(split * share + share, KT)):
        here = words_at + (tile * KT + t) * (P * TILE * W)
        w = tl.load(here, eviction_policy="evict_first")
        if P == 3:
            p = tl.load(here + TILE * W, eviction_policy="evict_first")
            r = tl.load(here + 2 * TILE * W, eviction_policy="evict_first")
        else:
            p, r = w, w
        for i in tl.static_range(F):
            if GROUP != 0 and i % SPAN == 0:
                at = (t * (KB // GROUP) + i // SPAN) * NP + n
                sg, zg = statistics(stats_ptr, scale_ptr, at, WIDE, BF16_SCALES)
                d = tl.zeros((BN, BM), tl.float32)
            if EVEN_K:
                xs = tl.load(x_at + (t * KB + i * W), mask=real, other=0.0, eviction_policy="evict_last")
            else:
                inside = real & (t * KB + i * W + ws[:, None] < K)
                xs = tl.load(x_at + (t * KB + i * W), mask=inside, other=0.0, eviction_policy="evict_last")
            if DECODE == 2:
                xs = xs.to(tl.float32)
            if GROUP == 0:
                acc = tl.dot(field(w, p, r, z, BITS, i, DECODE, BF16), xs, acc, input_precision="ieee")
            else:
                d = tl.dot(field(w, p, r, zg, BITS, i, DECODE, BF16), xs, d, input_precision="ieee")
                if i % SPAN == SPAN - 1:
                    acc += d * sg[:, None]
    if GROUP == 0:
        acc *= s[:, None]
    if OUTLIERS:
        acc = _outliers(acc, x_ptr, stride_x, xt_ptr, stride_t, M, tile_m, starts_ptr, entries_ptr, run_starts_ptr, run_rows_ptr,
                        runs_ptr, tile, shift, split, BM, BN, SPLIT, OUTLIERS, BF16_VALUES)  # fmt: skip
    _store(acc, bias_ptr, y_ptr + m[None, :] * stride_y + n[:, None], work_ptr, locks_ptr, tile_m * tl.num_programs(0) + block,
           split, n < N, m < M, n, BM, BN, SPLIT, BIAS)  # fmt: skip


@triton.jit(do_not_specialize=("first", "KT"))
def dense(words_ptr, stats_ptr, scale_ptr, out_ptr, first, N, NP, K, KT,
          BITS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BF16_SCALES: tl.constexpr,
          DECODE: tl.constexpr):  # fmt: skip
    """Rows 128·first … of W into out (rows, K): (q - z) · scale in fp32, rounded once. Grid: (tiles, KT)."""
    KB: tl.constexpr = columns(BITS, GROUP)
    F: tl.constexpr = fields(BITS)
    P: tl.constexpr = planes(BITS)
    W: tl.constexpr = KB // F
    SPAN: tl.constexpr = F if GROUP == 0 else GROUP // W
    BF16: tl.constexpr = out_ptr.dtype.element_ty == tl.bfloat16
    tile, t = tl.program_id(0), tl.program_id(1)
    rows, ws = tl.arange(0, TILE), tl.arange(0, W)
    n = (first + tile) * TILE + rows
    here = words_ptr + ((first + tile) * KT + t).to(tl.int64) * (P * TILE * W) + rows[:, None] * W + ws[None, :]
    w = tl.load(here, eviction_policy="evict_first")
    if P == 3:
        p, r = tl.load(here + TILE * W), tl.load(here + 2 * TILE * W)
    else:
        p, r = w, w
    for i in tl.static_range(F):
        if i % SPAN == 0:
            at = n if GROUP == 0 else (t * (KB // GROUP) + i // SPAN) * NP + n
            s, z = statistics(stats_ptr, scale_ptr, at, WIDE, BF16_SCALES)
        q = field(w, p, r, z, BITS, i, DECODE, BF16)
        k = t * KB + i * W + ws
        spot = out_ptr + (tile * TILE + rows).to(tl.int64)[:, None] * K + k[None, :]
        tl.store(spot, (q.to(tl.float32) * s[:, None]).to(out_ptr.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


@triton.jit(do_not_specialize=("first",))
def put(starts_ptr, entries_ptr, run_starts_ptr, run_rows_ptr, runs_ptr, out_ptr, first, K, BF16_VALUES: tl.constexpr):
    """Outliers of the rows 128·first … over what `dense` wrote. Grid: (tiles,)."""
    tile = tl.program_id(0)
    rows = tl.arange(0, TILE)
    out_at = out_ptr + tile.to(tl.int64) * TILE * K
    end = tl.load(starts_ptr + first + tile + 1)
    for c in range(tl.load(starts_ptr + first + tile), end):
        entry = tl.load(entries_ptr + ((rows + c * TILE) * STEP)[:, None] + tl.arange(0, STEP)[None, :])
        column, value = _column_and_value(entry, BF16_VALUES)
        tl.store(out_at + rows[:, None] * K + column, value.to(out_ptr.dtype.element_ty), mask=entry != EMPTY)
    end = tl.load(run_starts_ptr + first + tile + 1)
    for c in range(tl.load(run_starts_ptr + first + tile), end):
        entry = tl.load(runs_ptr + c * RUN + tl.arange(0, RUN))
        column, value = _column_and_value(entry, BF16_VALUES)
        spot = out_at + tl.load(run_rows_ptr + c) * K + column
        tl.store(spot, value.to(out_ptr.dtype.element_ty), mask=entry != EMPTY)

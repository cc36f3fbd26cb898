"""Device code of the Hadamard transform, for Triton's compiler. Imports triton only."""

# mypy: ignore-errors
# ruff: noqa: SIM300 (TYPE is a parameter)
import triton
import triton.language as tl


@triton.jit
def _sylvester(ORDER: tl.constexpr, TYPE: tl.constexpr):
    """(ORDER, ORDER) of ±1, for orders up to 256."""
    i = tl.arange(0, ORDER)
    shared = i[:, None] & i[None, :]
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return (1 - 2 * (shared & 1)).to(tl.float32).to(TYPE)


@triton.jit
def _right(y, ORDER: tl.constexpr, TYPE: tl.constexpr):
    """fp32 y (rows, ORDER) times Sylvester's matrix. 16-bit TYPE: y as the sum of two numbers of 16 bits, with products exact."""
    if TYPE == tl.float32:
        out = tl.dot(y, _sylvester(ORDER, TYPE), input_precision="ieee")
    else:
        high = y.to(TYPE)
        out = tl.dot((y - high.to(tl.float32)).to(TYPE), _sylvester(ORDER, TYPE))
        out = tl.dot(high, _sylvester(ORDER, TYPE), out)
    return out


@triton.jit
def _left(base, y, TYPE: tl.constexpr):
    """base (k, k) times fp32 y (k, columns), as `_right`."""
    if TYPE == tl.float32:
        out = tl.dot(base.to(TYPE), y, input_precision="ieee")
    else:
        high = y.to(TYPE)
        out = tl.dot(base.to(TYPE), (y - high.to(tl.float32)).to(TYPE))
        out = tl.dot(base.to(TYPE), high, out)
    return out


@triton.jit
def transform(x_ptr, up_ptr, base_ptr, y_ptr, stride_x, stride_up, n, scale, scale_c, scale_b,
              A: tl.constexpr, AP: tl.constexpr, B: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """One row of x, as (A, B, C): C's Sylvester matrix first, then B's, then base (A, A); AP is A, padded to a power of two.

    The sums stay in fp32; between the factors they are scaled by 1/sqrt(C) and 1/sqrt(B), so that fp16 parts do not overflow.
    UPCAST: fp32 operands throughout, for fp32 and for the interpreter's bf16.
    """
    row = tl.program_id(0).to(tl.int64)
    TYPE: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    at = tl.arange(0, AP * B)[:, None] * C + tl.arange(0, C)[None, :]
    v = tl.load(x_ptr + row * stride_x + at, mask=at < n, other=0.0)
    if GATED:
        g = v.to(tl.float32)
        u = tl.load(up_ptr + row * stride_up + at, mask=at < n, other=0.0).to(tl.float32)
        silu = (g * tl.sigmoid(g)).to(x_ptr.dtype.element_ty).to(tl.float32)
        v = (silu * u).to(x_ptr.dtype.element_ty)
    y = tl.dot(v.to(TYPE), _sylvester(C, TYPE), input_precision="ieee")
    if B > 1:
        y = tl.reshape(tl.permute(tl.reshape(y * scale_c, (AP, B, C)), (0, 2, 1)), (AP * C, B))
        y = tl.permute(tl.reshape(_right(y, B, TYPE), (AP, C, B)), (0, 2, 1))
    if A > 1:  # in parts of the rows of base, which are stored as they come
        HALF: tl.constexpr = AP if AP < 128 else 128
        y = tl.reshape(y, (AP, B * C)) * scale_b
        k = tl.arange(0, AP)
        for part in tl.static_range(AP // HALF):
            a = part * HALF + tl.arange(0, HALF)
            inside = (a[:, None] < A) & (k[None, :] < A)
            base = tl.load(base_ptr + k[None, :] * A + a[:, None], mask=inside, other=0).to(tl.float32)  # transposed
            out = tl.reshape(_left(base, y, TYPE), (HALF * B, C)) * scale
            spot = (part * HALF * B + tl.arange(0, HALF * B)[:, None]) * C + tl.arange(0, C)[None, :]
            tl.store(y_ptr + row * n + spot, out.to(y_ptr.dtype.element_ty), mask=spot < n)
    else:
        y = tl.reshape(y, (AP * B, C)) * scale
        tl.store(y_ptr + row * n + at, y.to(y_ptr.dtype.element_ty), mask=at < n)

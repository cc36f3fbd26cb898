"""Device code of the Hadamard transform, for Triton's compiler. Imports triton only."""

# mypy: ignore-errors
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
def transform(x_ptr, up_ptr, base_ptr, y_ptr, stride_x, stride_up, n, scale,
              A: tl.constexpr, AP: tl.constexpr, B: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """One row of x, as (A, B, C): C's Sylvester matrix first, then B's, then base (A, A); AP is A, padded to a power of two.

    A dot of 16-bit numbers with ±1 is exact up to fp32 sums; the later ones are of fp32 sums, taken apart into tf32 parts (tf32x3).
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
    y = tl.dot(v.to(TYPE), _sylvester(C, TYPE), input_precision="tf32x3")
    if B > 1:
        y = tl.reshape(tl.permute(tl.reshape(y, (AP, B, C)), (0, 2, 1)), (AP * C, B))
        y = tl.dot(y, _sylvester(B, tl.float32), input_precision="tf32x3")
        y = tl.permute(tl.reshape(y, (AP, C, B)), (0, 2, 1))
    if A > 1:
        a = tl.arange(0, AP)
        inside = (a[:, None] < A) & (a[None, :] < A)
        base = tl.load(base_ptr + a[None, :] * A + a[:, None], mask=inside, other=0).to(tl.float32)  # transposed
        y = tl.dot(base, tl.reshape(y, (AP, B * C)), input_precision="tf32x3")
    y = tl.reshape(y, (AP * B, C)) * scale
    tl.store(y_ptr + row * n + at, y.to(y_ptr.dtype.element_ty), mask=at < n)

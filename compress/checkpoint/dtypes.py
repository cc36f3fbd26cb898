"""safetensors dtype names and torch dtypes."""

from __future__ import annotations

import torch

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAME = {value: key for key, value in TORCH.items()}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: both show in the least or the greatest value, which one fast pass finds."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least)) and bool(torch.isfinite(greatest))


def itemsize(name: str) -> int:
    """Bytes per element of a safetensors dtype."""
    return TORCH[name].itemsize

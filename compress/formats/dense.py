"""Dense weights in the checkpoint's own dtype: an ordinary checkpoint that loads everywhere and saves no memory.

One tensor, `weight` (O, I), the dequantized values rounded to the dtype. The grid is lost: `unpack` is not possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.types import TensorSpec

KIND = "dense"
VERSION = 1


def spec(params: Mapping[str, Any], shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """One dense tensor."""
    return {"weight": (dtype, shape)}

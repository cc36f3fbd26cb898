"""Which device a job runs on."""

from __future__ import annotations

import torch

from compress.errors import CompressError


def pick(device: str | torch.device) -> str:
    """A device's name: `auto` is the first GPU if there is one; a device that torch does not see is an error."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = torch.device("meta")
    if parsed.type not in ("cpu", "cuda"):
        raise CompressError(f"--device {str(device)!r} is unknown", hint="use auto, cpu, cuda or cuda:N", usage=True)
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise CompressError(f"--device {device}: torch sees no such GPU", hint="use --device cpu, or another number", usage=True)
    return "cpu" if parsed.type == "cpu" else str(device)

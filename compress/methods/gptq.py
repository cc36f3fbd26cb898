"""GPTQ: rounding with second-order error compensation (arXiv 2210.17323).

    minimise over W_hat on the grid   tr((W - W_hat) H (W - W_hat)ᵀ),     H = sum over tokens of x xᵀ

Blocks in order, each calibrated on the compressed blocks before it; inside a block the groups qkv, o, gate/up, down in order,
each calibrated on the compressed groups before it (`sequential`; off: one pass, as llm-compressor does). Solver: `_solvers`, held
to the official code's numbers in docs/parity.md. Two defaults of ours, because they are better on real models (docs/quality.md):
`act_order="group"` takes whole groups by falling activation, which needs no index in the file, and `clip="hessian"` fits each
group's range to what its errors cost after compensation. `act_order="off", clip="off"` is the paper's algorithm. A row that would
end above plain rounding keeps plain rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.methods._second_order import SecondOrder, collects, compress, stages, workspace

CALIBRATED = True
CORES = True  # quantizes ARMOR's cores
__all__ = ["CALIBRATED", "CORES", "Config", "collects", "compress", "stages", "workspace"]


@dataclass(frozen=True, slots=True)
class Config(SecondOrder):
    """Options of GPTQ."""

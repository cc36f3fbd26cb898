"""The GPU kernels compiled without a GPU: registers, spills, shared memory and instructions per weight, from the machine code
itself.

Triton brings the assembler and the disassembler. A count is static: lane-instructions of the main loop over the weights that it
decodes. It says nothing of latencies, but an H200 has only some four instructions per 4-bit weight before its memory is no
longer the limit. TRITON_INTERPRET must not be set when Triton is imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel for one target."""

    registers: int
    stack: int  # bytes per thread: spills
    shared: int  # bytes per program
    per_weight: float  # lane-instructions in the main loop; 0 where there is no loop with a matrix product
    loop: dict[str, int]  # opcodes of the main loop
    opcodes: dict[str, int]  # of the whole kernel
    ptx: str


def arguments(dtype: str) -> dict[str, str]:
    """Types of `product`'s run-time arguments, in order."""
    x = "*" + _TYPES[dtype]
    names = {"x_ptr": x, "words_ptr": "*i16", "stats_ptr": "*i32", "scale_ptr": "*fp32", "bias_ptr": x, "y_ptr": x}
    names |= {"work_ptr": "*fp32", "locks_ptr": "*i32", "xt_ptr": x, "starts_ptr": "*i32", "entries_ptr": "*i32"}
    names |= {"run_starts_ptr": "*i32", "run_rows_ptr": "*i32", "runs_ptr": "*i32"}
    return names | dict.fromkeys(("M", "N", "NP", "K", "KT", "stride_x", "stride_y", "stride_t"), "i32")


def product(
    target: int, bits: int, *, group: int = 128, dtype: str = "float16", wide: bool = False, BM: int = 16, BN: int = 128,
    warps: int = 4, stages: int = 4, split: int = 1, outliers: int = 0,
) -> Report:  # fmt: skip
    """Compile `int_grouped.device.product` for compute capability `target` (80, 90). `group` 0: one scale per row."""
    from compress_kernels.int_grouped import device

    constants = {"BITS": bits, "GROUP": group, "WIDE": wide, "BF16_SCALES": dtype == "bfloat16", "BM": BM, "BN": BN,
                 "SPLIT": split, "EVEN_K": True, "BIAS": False, "OUTLIERS": outliers,
                 "BF16_VALUES": dtype == "bfloat16", "DECODE": 0}  # fmt: skip
    even = ("N", "NP", "K", "stride_x", "stride_y", "stride_t")
    made, where = compiled(device.product, arguments(dtype), constants, even, target, warps, stages)
    return _report(made, where, warps, BM)


def dense(target: int, bits: int, *, group: int = 128, dtype: str = "float16") -> Report:
    """Compile `int_grouped.device.dense`, which decodes a weight."""
    from compress_kernels.int_grouped import device

    types = {"words_ptr": "*i16", "stats_ptr": "*i32", "scale_ptr": "*fp32", "out_ptr": "*" + _TYPES[dtype]}
    types |= dict.fromkeys(("first", "N", "NP", "K", "KT"), "i32")
    constants = {"BITS": bits, "GROUP": group, "WIDE": False, "BF16_SCALES": dtype == "bfloat16", "DECODE": 0}
    return _report(*compiled(device.dense, types, constants, ("NP", "K"), target, 4), 4, 16)


def put(target: int, *, dtype: str = "float16") -> Report:
    """Compile `int_grouped.device.put`, which writes outliers over a decoded weight."""
    from compress_kernels.int_grouped import device

    names = ("starts_ptr", "entries_ptr", "run_starts_ptr", "run_rows_ptr", "runs_ptr")
    types = dict.fromkeys(names, "*i32") | {"out_ptr": "*" + _TYPES[dtype], "first": "i32", "K": "i32"}
    return _report(*compiled(device.put, types, {"BF16_VALUES": dtype == "bfloat16"}, ("K",), target, 4), 4, 16)


def hadamard(target: int, *, A: int = 1, B: int = 64, C: int = 64, warps: int = 4, dtype: str = "float16") -> Report:
    """Compile `hadamard.device.transform` of rows of A·B·C elements, with the gated activation."""
    from compress_kernels.hadamard import device

    x = "*" + _TYPES[dtype]
    types = {"x_ptr": x, "up_ptr": x, "base_ptr": "*i8", "y_ptr": x, "stride_x": "i32", "stride_up": "i32", "n": "i32"}
    types |= dict.fromkeys(("scale", "scale_c", "scale_b"), "fp32")
    constants = {"A": A, "AP": 1 << (A - 1).bit_length(), "B": B, "C": C, "GATED": True, "UPCAST": False}
    return _report(*compiled(device.transform, types, constants, ("stride_x", "stride_up", "n"), target, warps), warps, 16)


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], even: tuple[str, ...], target: int, warps: int, stages: int = 3
) -> tuple[Any, int]:
    """Triton's result for a kernel; pointers, and the integers named in `even`, are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name] for name in order}
    aligned = [name for name in order if signature[name].startswith("*") or name in even]
    attrs = {(order.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attrs)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "num_stages": stages})
    return made, target


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"Triton's {name} is not at {path}")
    return str(path)


def _report(made: Any, target: int, warps: int, BM: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        run = [_tool("cuobjdump"), "-res-usage", "-sass", str(cubin)]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert usage, text[:2000]
    code = [(int(a, 16), line.strip()) for a, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)]
    loop = main_loop(code)
    mma = sum(n for op, n in loop.items() if op in ("HGMMA", "HMMA"))
    decoded = mma * (64 * 16 * warps // 4 if "HGMMA" in loop else 16 * 16 * warps * 8 // BM)
    registers, stack, _ = map(int, usage.groups())
    return Report(
        registers, stack, int(made.metadata.shared), sum(loop.values()) * 32 * warps / decoded if decoded else 0.0, dict(loop),
        dict(Counter(opcode(line) for _, line in code)), made.asm["ptx"],
    )  # fmt: skip


def opcode(line: str) -> str:
    """`@P0 LDS.128 R4, …` -> LDS."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split(" ")[0].split(".")[0]


def main_loop(code: list[tuple[int, str]]) -> Counter[str]:
    """Opcodes between the shortest backward branch around a matrix product and its target."""
    best: Counter[str] = Counter()
    for address, line in code:
        jump = re.search(r"\bBRA(?:\.\S+)?\s+(?:!?U?P\w+,\s*)?`?\(?(?:0x)?([0-9a-f]+)", line)
        if jump and int(jump[1], 16) < address:
            seen = Counter(opcode(text) for a, text in code if int(jump[1], 16) <= a <= address)
            if (seen["HGMMA"] or seen["HMMA"]) and (not best or sum(seen.values()) < sum(best.values())):
                best = seen
    return best

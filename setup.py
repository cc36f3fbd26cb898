"""Builds the C++ library of compress_kernels, `_cpu.so`, where a compiler is there; without one all runs in torch.

The metadata are in pyproject.toml. Every kind's `cpu.cpp` is compiled once per instruction set and the library chooses at run
time, so one wheel serves every CPU of an architecture.
CC_SANITIZE=1 builds with AddressSanitizer and UBSan (tests/test_native.py).
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
KERNELS = HERE / "kernels" / "compress_kernels"
KINDS = ("int_grouped", "bitmask", "armor", "lowrank_sparse", "masked_delta", "block")
X86 = {0: [], 1: ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]}
X86[2] = [*X86[1], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
X86[3] = [*X86[2], "-mavx512vbmi2", "-mavx512bf16"]
ISAS = X86 if platform.machine() in ("x86_64", "AMD64") else {0: []}


def compile_library(out: Path, work: Path) -> None:
    """Compile every source and link them to the library `out`. Raises OSError or CalledProcessError."""
    compiler = os.environ.get("CXX", "c++")
    flags = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-w"]
    if os.environ.get("CC_SANITIZE"):
        flags += ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    work.mkdir(parents=True, exist_ok=True)
    sources = [(KERNELS / kind / "cpu.cpp", isa) for kind in KINDS for isa in ISAS] + [(KERNELS / "native" / "dispatch.cpp", 0)]

    def compile_one(source: Path, isa: int) -> str:
        out = str(work / f"{source.parent.name}_{isa}.o")
        subprocess.run([compiler, *flags, f"-DCC_ISA={isa}", *ISAS[isa], "-c", str(source), "-o", out], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, *zip(*sources, strict=True)))
    partial = out.with_name(out.name + ".tmp")
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", str(partial)], check=True)
    partial.replace(out)


class Build(build_ext):
    """The library beside the package's Python files; a failure is a warning."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            compile_library(out, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"warning: the C++ kernels were not built ({error}); compressed models run in torch, slower", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """An editable install: beside the sources."""
        built = Path(self.build_lib) / self.get_ext_filename("compress_kernels._cpu")
        if built.exists():
            shutil.copyfile(built, KERNELS / f"_cpu.so.{os.getpid()}")
            (KERNELS / f"_cpu.so.{os.getpid()}").replace(KERNELS / "_cpu.so")

    def get_outputs(self) -> list[str]:
        return [p for p in super().get_outputs() if Path(p).exists()]


class Wheel(bdist_wheel):
    """The library uses no Python: one wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(ext_modules=[Extension("compress_kernels._cpu", [], optional=True)], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})

"""The house: imports go one way, importing costs nothing, long files and functions want a reason."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, python

LEVELS = [
    {"errors", "log", "types"},
    {"registry", "formats", "checkpoint", "stats", "devices", "products"},
    {"models", "calibration"},
    {"modules", "methods", "fusion"},
    {"pipeline", "loading", "switching", "tasklayers", "decoding", "subjects"},
    {"audit", "generation", "fit", "job", "running", "evaluation", "training", "timing", "tuning", "bundling"}
    | {"extracting", "merging"}
    | {"bundle_audit"},
    {"cli"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
FOREIGN = {
    "transformers": {"models", "loading", "decoding", "switching", "evaluation", "calibration", "generation"},
    "lm_eval": {"evaluation"},
    "datasets": {"calibration"},
    "accelerate": {"models", "loading"},
    "triton": set(),
}
FILES = sorted((ROOT / "compress").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "compress").parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    """(dotted name, node) of every import, `from a import b` as a.b."""
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_room_imports_a_higher_one(path: Path) -> None:
    me = room(path)
    if me == "__init__":
        return
    assert me in LEVEL, f"{me} is a new room: give it a level"
    for name, _ in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "compress" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != me:
            assert LEVEL[parts[1]] <= LEVEL[me], f"{path.name} imports {name}"
            assert not (me == "methods" and parts[1] in ("pipeline", "checkpoint", "models")), f"{path.name} imports {name}"
        if me == "methods" and parts[0] == "compress_kernels":
            raise AssertionError(f"{path.name} imports {name}")


def test_methods_do_not_import_each_other() -> None:
    folder = ROOT / "compress" / "methods"
    public = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}
    for path in folder.glob("*.py"):
        for name, _ in imports(ast.parse(path.read_text())):
            parts = name.split(".")
            assert not (parts[:2] == ["compress", "methods"] and len(parts) > 2 and parts[2] in public), f"{path.name}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_are_imported_inside_functions_and_only_where_allowed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    top = {id(n) for n in tree.body}
    for name, node in imports(tree):
        package = name.split(".")[0]
        if package in FOREIGN:
            assert room(path) in FOREIGN[package], f"{path.name} imports {package}"
            assert id(node) not in top, f"{path.name} imports {package} at the top"


def test_the_kernels_import_nothing_of_compress() -> None:
    for path in (ROOT / "kernels" / "compress_kernels").rglob("*.py"):
        names = {n.split(".")[0] for n, _ in imports(ast.parse(path.read_text()))}
        assert names <= {"torch", "triton", "compress_kernels", *sys.stdlib_module_names}, f"{path.name}: {names}"


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    for line in ("import compress", "import compress.evaluation", "import compress.cli.app"):
        done = python(f"{line}; import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])")
        assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_answers_within_half_a_second_without_torch() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = python(
            "import sys; from compress.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
        )
        seconds.append(time.perf_counter() - start)
        assert "quantize" in done.stdout, done.stderr
    assert min(seconds) < 0.5 * (4 if min(seconds) > 1 else 1), seconds  # a crowded machine gets a second chance


def test_every_public_name_of_the_package_exists() -> None:
    import compress

    assert all(getattr(compress, name) is not None for name in compress.__all__)
    with pytest.raises(AttributeError):
        compress.nothing  # noqa: B018


REASONED: dict[str, str] = {}  # file or function -> why it is long


def test_long_files_and_functions_have_a_reason() -> None:
    for path in [*FILES, *(ROOT / "kernels").rglob("*.py")]:
        text = path.read_text()
        assert text.count("\n") <= 400 or path.name in REASONED, f"{path}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                assert size <= 60 or node.name in REASONED, f"{path}: {node.name} has {size} lines"


def test_both_names_of_the_command_and_the_launcher_answer() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "methods"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "awq" in done.stdout
    for command in ("compress", "llm-compress"):
        path = Path(sys.executable).parent / command
        assert "awq" in subprocess.run([path, "methods"], capture_output=True, text=True, timeout=60, check=False).stdout

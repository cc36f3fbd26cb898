"""A model named by a folder or by a hub id becomes a local folder; what belongs to a model besides its weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from compress.checkpoint.reader import INDEX
from compress.errors import CompressError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMPANIONS = re.compile(
    r".*\.(json|jinja|model|tiktoken|py)|(vocab|merges|added_tokens|special_tokens)\.txt|(licen[cs]e|notice|copying|use_policy).*",
    re.IGNORECASE,
)
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
    ".tflite",
    ".ot",
)
_REWRITTEN = ("config.json", "README.md", "manifest.json", "report.json")


def resolve(model: str | Path) -> Path:
    """The local folder of `model`: itself, or a snapshot of the hub id (safetensors and small files only)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CompressError(f"{path}: not a folder", hint="give the folder that holds config.json and the safetensors files")
    if not _HUB_ID.fullmatch(str(model)):
        raise CompressError(f"{model}: no such folder", hint="check the path, or give a hub id such as org/name", usage=True)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises a dozen unrelated types; every one means: no snapshot
        raise CompressError(
            f"{model}: no such folder, and it could not be fetched from the hub ({type(error).__name__})",
            hint="check the spelling and the network, or download the model and give its folder",
        ) from error


def revision(folder: Path) -> str | None:
    """The commit of a hub snapshot folder, if it is one."""
    return folder.name if folder.parent.name == "snapshots" else None


def companions(folder: Path) -> list[Path]:
    """Files that belong to the model and are copied as they are: tokenizer, chat template, processor, licence, notices."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.is_file() and _COMPANIONS.fullmatch(p.name) and not p.name.endswith(_WEIGHTS) and p.name not in _REWRITTEN
    )


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, weights: list[str]) -> dict[str, str]:
    """sha256 of everything that decides a job: weight files, their index, config.json and the companions."""
    files = {folder / name for name in weights} | {folder / "config.json"} | set(companions(folder))
    if (folder / INDEX).is_file():
        files.add(folder / INDEX)
    return {path.name: sha256(path) for path in sorted(files)}

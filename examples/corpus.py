"""Local text for the training examples: documents of a file or folder, a held-out part, batches of token windows.

    documents("poems.txt")      a .txt file is one document, a .jsonl file one per line (its `text`), a folder all of its files
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from compress.errors import CompressError

_NO_TEXT = ("notice", "license", "licence", "readme", "copying")  # files that speak about a corpus


def documents(path: Path) -> list[str]:
    """The documents of a .txt file, a .jsonl file, or every such file of a folder, in the order of names and lines."""
    if path.is_dir():
        return [text for file in text_files(path) for text in documents(file)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompressError(f"{path}: cannot be read as UTF-8 text", hint="give .txt, .jsonl, or a folder of them") from error
    if path.suffix != ".jsonl":
        return [text]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise CompressError(f"{path}: line {number} is no JSON object with a `text`", hint="rename the field") from error
        found.append(str(row))
    return found


def text_files(folder: Path) -> list[Path]:
    """The .txt and .jsonl files of a folder, notices left out."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".txt", ".jsonl") and not p.stem.lower().startswith(_NO_TEXT)]
    if not files:
        raise CompressError(f"{folder}: no .txt or .jsonl file in it", hint="give a file, or another folder")
    return files


def split(path: Path, held_out: int, seed: int) -> tuple[list[str], str]:
    """(training documents, held-out text of about `held_out` characters, at most a tenth of the corpus).

    A folder with files called `valid…` is split already. Else the last documents in a random order are held out, or, of a
    single text, its end; no piece of text is in both parts.
    """
    files = text_files(path) if path.is_dir() else [path]
    held = [p for p in files if p.stem.startswith("valid")]
    if held and len(held) < len(files):
        train = [text for p in files if p not in held for text in documents(p)]
        valid = "\n\n".join(text for p in held for text in documents(p))
        return train, valid[:held_out]
    texts = documents(path)
    held_out = min(held_out, sum(map(len, texts)) // 10)
    if len(texts) == 1:
        text = texts[0]
        at = text.rfind("\n\n", 0, len(text) - held_out)
        at = at if at > 0 else len(text) - held_out
        return [text[:at]], text[at:].lstrip("\n")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    kept: list[str] = []
    while order and sum(map(len, kept)) < held_out:
        kept.append(texts[order.pop()])
    return [texts[i] for i in order], "\n\n".join(kept)[: max(held_out, 1)]


def batches(windows: torch.Tensor, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches (size, T) of the windows (N, T), in a new random order on each pass over them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        yield windows[order[:size]]
        order = order[size:]

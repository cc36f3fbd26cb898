"""Calibration text becomes fixed token windows; the windows' hash goes into the manifest.

A dataset is a .txt file (one text), a .jsonl file (`text`, or `messages` through the chat template), a .parquet file (`text`), a
folder of these, a hub name `name[:config][:split]` through `datasets`, or the built-in text. Documents are joined by blank
lines, tokenized without special tokens and cut into windows of `seqlen`; the first `nsamples` are taken, or, with a seed, a
random choice of all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError

logger = logging.getLogger(__name__)
BUILTIN = Path(__file__).parent / "data" / "calibration.txt"
DEFAULT_SEQLEN = 512
_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token windows (N, T), int64, and the sha256 of their shape and bytes."""

    tokens: torch.Tensor
    sha256: str


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CompressError(
            f"{folder}: its tokenizer cannot be loaded ({str(error).strip().split(chr(10))[0]})",
            hint="copy the tokenizer files into the folder",
        ) from error


def context_length(config: Any) -> int:
    """The longest window the model takes."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 30)


def pick_seqlen(seqlen: int | None, config: Any) -> int:
    """The window length: as asked, or min(512, the model's context), said aloud."""
    longest = context_length(config)
    if seqlen is None:
        seqlen = min(DEFAULT_SEQLEN, longest)
        logger.info("calibration windows of %d tokens (--seqlen)", seqlen)
    if not 2 <= seqlen <= longest:
        raise CompressError(
            f"--seqlen {seqlen} does not fit the model's context of {longest}", hint=f"use 2..{longest}", usage=True
        )
    return seqlen


def windows(
    text: str, tokenizer: Any, nsamples: int, seqlen: int, seed: int | None, name: str, option: str = "--dataset"
) -> torch.Tensor:  # fmt: skip
    """Windows (N, T) of one text; N < nsamples where the text is short, an error where it holds none."""
    enough = 24 * nsamples * seqlen  # characters; more than any tokenizer needs, so that a huge file is not tokenized whole
    if seed is None and len(text) > enough:
        text = text[:enough]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    count = len(ids) // seqlen
    if count == 0:
        raise CompressError(
            f"{name}: {len(ids)} tokens are less than one window of {seqlen}",
            hint=f"give more text with {option}, or a smaller --seqlen",
        )
    if count < nsamples:
        logger.warning("%s holds %d windows of %d tokens, not %d: using them all", name, count, seqlen, nsamples)
    all_windows = ids[: count * seqlen].view(count, seqlen)
    if seed is None:
        return all_windows[:nsamples].clone()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:nsamples]
    return all_windows[order.sort().values].clone()


def load(
    dataset: str | Path | None, tokenizer: Any, *, nsamples: int, seqlen: int, seed: int | None, vocab: int,
    option: str = "--dataset",
) -> Calibration:  # fmt: skip
    """Read, tokenize and hash the calibration windows. `vocab` is the model's vocabulary size, `option` what gave the dataset."""
    if nsamples < 1:
        raise CompressError(f"--nsamples {nsamples} is not a number of windows", hint="use 1 or more", usage=True)
    path = Path(dataset) if dataset is not None else BUILTIN
    name = "the built-in text" if dataset is None else str(dataset)
    budget = 24 * nsamples * seqlen if seed is None else None
    documents = _read(path, tokenizer, budget) if path.exists() else _hub(str(dataset), tokenizer, option)
    text = _join(documents, budget)
    if not text.strip():
        raise CompressError(
            f"{name}: no text found", hint="jsonl and parquet need a `text` field, or `messages` in jsonl", usage=True
        )
    tokens = windows(text, tokenizer, nsamples, seqlen, seed, name, option)
    if int(tokens.max()) >= vocab:
        raise CompressError(
            f"{name}: token {int(tokens.max())} is outside the model's vocabulary of {vocab}",
            hint="the tokenizer is another model's",
        )
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()
    return Calibration(tokens, digest)


def expand(tokens: torch.Tensor, factor: int) -> torch.Tensor:
    """RSQ's expansion (ylsung/rsq `data_utils.py: expand_dataset`): windows (N, T) and their cyclic shifts, (N * factor, T)."""
    return torch.cat([tokens.roll(f * (tokens.shape[1] // factor), 1) for f in range(factor)])


def _join(documents: Iterator[str], budget: int | None) -> str:
    parts, size = [], 0
    for document in documents:
        parts.append(document)
        size += len(document) + 2
        if budget is not None and size > budget:
            break
    return "\n\n".join(parts)


def _read(path: Path, tokenizer: Any, budget: int | None) -> Iterator[str]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if not files:
            raise CompressError(f"{path}: no .txt, .jsonl or .parquet file in it", hint="give a file or another folder", usage=True)
        for file in files:
            yield from _read(file, tokenizer, budget)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path, tokenizer)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path)
            if "text" not in table.schema_arrow.names:
                raise ValueError("no `text` column")
            for batch in table.iter_batches(columns=["text"]):
                yield from (str(t) for t in batch.column(0).to_pylist() if t)
        except (OSError, ValueError, KeyError) as error:
            raise CompressError(f"{path}: {str(error).splitlines()[0]}", hint="it needs a `text` column", usage=True) from error
    else:
        try:
            with path.open(encoding="utf-8") as text:
                yield text.read(-1 if budget is None else budget)
        except (OSError, UnicodeDecodeError) as error:
            raise CompressError(f"{path}: not readable as UTF-8 text", hint="use .txt, .jsonl or .parquet", usage=True) from error


def _read_jsonl(path: Path, tokenizer: Any) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CompressError(f"{path}: line {number} is not JSON", hint="one JSON object per line", usage=True) from error
            text = _document(row, tokenizer)
            if text is None:
                raise CompressError(f"{path}: line {number} has neither `text` nor `messages`", hint="rename the field", usage=True)
            yield text


def _document(row: Any, tokenizer: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise CompressError("the dataset holds `messages` but the tokenizer has no chat template", hint="use a `text` field")
        try:
            return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        except Exception as error:  # templates raise errors of their own
            raise CompressError(f"the chat template refuses a row ({error})", hint="use a `text` field") from error
    return None


def _hub(dataset: str, tokenizer: Any, option: str) -> Iterator[str]:
    if dataset.endswith(_SUFFIXES):
        raise CompressError(f"{option} {dataset}: no such file", hint="check the path", usage=True)
    from datasets import load_dataset

    name, *rest = dataset.split(":")
    config, split = (rest[0] or None) if rest else None, rest[1] if len(rest) > 1 else "train"
    try:
        for row in load_dataset(name, config, split=split, streaming=True):
            text = _document(row, tokenizer)
            if text:
                yield text
    except CompressError:
        raise
    except Exception as error:  # datasets and the hub client raise a dozen unrelated types
        raise CompressError(
            f"{option} {dataset}: no such file, and no such dataset on the hub ({type(error).__name__})",
            hint="give a local .txt, .jsonl or .parquet file, a folder, or name[:config][:split] with network",
            usage=True,
        ) from error

"""Several checkpoints of one family in step, tensor by tensor and piece by piece: for methods that need no activations.

A `Source` is a checkpoint under its model's names: a folder of its own, or a LoRA folder merged on read. `items` says from the
headers how every tensor is treated; `pieces` gives the deltas of one tensor in runs of rows, so that memory is a few pieces,
whatever the tensor.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint import bundled, dtypes, lora, source
from compress.checkpoint.reader import CheckpointReader, matrix, read_json
from compress.errors import CompressError
from compress.methods import _taskmask
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView

logger = logging.getLogger(__name__)
ROOM = 16 << 20  # fp32 numbers that one piece of all checkpoints may take, workspace included
_NEAR = 0.01  # squared distance of two deltas against the smaller one's norm, below which a warning is given
Trim = tuple[list[float], float]


@dataclass(frozen=True)
class Source:
    """One checkpoint of the job."""

    name: str
    folder: Path  # of its tokenizer and the like
    config: dict[str, Any]  # config.json
    skeleton: Skeleton
    view: CheckpointView
    files: dict[str, str]  # sha256 of everything that decides it
    weight_bytes: int
    adapter: bool = False
    hub: str | None = None  # the hub id that it was given as

    @property
    def names(self) -> list[str]:
        """Its tensors; a copy that the config ties to another tensor is none."""
        tied = set(self.skeleton.model.all_tied_weights_keys) if self.config_ties else set()
        return [n for n in self.view.names if n not in tied]

    @property
    def config_ties(self) -> bool:
        """Whether the head is the embedding."""
        return bool(getattr(self.skeleton.config, "tie_word_embeddings", False))

    @property
    def embeddings(self) -> set[str]:
        """Names of the embeddings' and the head's weights."""
        model = self.skeleton.model
        head = model.get_output_embeddings()
        found = (n for n, m in model.named_modules() if isinstance(m, nn.Embedding) or m is head)
        return {f"{n}.weight" for n in found}


def open_source(path: str | Path, name: str, base: Source | None = None) -> Source:
    """A checkpoint from its headers; of a fine-tune `base` is the one that an adapter is merged into."""
    folder = source.resolve(path)
    if base is not None and lora.is_adapter(folder):
        return _open_adapter(folder, name, base)
    if bundled.is_bundle(folder):
        raise CompressError(f"{folder}: a bundle, not a checkpoint", hint="compress extract gives its tasks back", usage=True)
    skeleton = Skeleton(load_config(folder))
    reader = CheckpointReader(folder)
    view = CheckpointView(reader, skeleton)
    files = reader.files()
    size = sum(e.nbytes for e in reader.entries.values())
    hub = None if Path(path).expanduser().is_dir() else str(path)
    return Source(name, folder, read_json(folder / "config.json"), skeleton, view, source.hashes(folder, files), size, hub=hub)


def _open_adapter(folder: Path, name: str, base: Source) -> Source:
    stored = {n: base.view.source(n) for n in base.names}
    reader = lora.LoraReader(folder, base.view.reader, stored, base.names)
    own = (folder / "config.json").is_file()
    raw = dict(read_json((folder if own else base.folder) / "config.json"))
    config = load_config(folder if own else base.folder)
    embedding = next((n for n in base.embeddings & set(reader.names) if "embed" in n), None)
    if embedding is not None and not own:  # an adapter that saved a grown embedding
        rows = reader.shape(embedding)[0]
        config.get_text_config().vocab_size = rows
        (raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw)["vocab_size"] = rows
    files = {n: source.sha256(folder / n) for n in (lora.CONFIG, lora.WEIGHTS)}
    files |= {p.name: source.sha256(p) for p in source.companions(folder)}
    skeleton = Skeleton(config)
    size = (folder / lora.WEIGHTS).stat().st_size
    return Source(name, folder, raw, skeleton, CheckpointView(reader, skeleton), files, size, adapter=True)


# -- what is done with each tensor -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor's name in all checkpoints."""

    name: str
    shape: tuple[int, ...] | None  # of the base's; None where the base has none
    masked: tuple[str, ...]  # fine-tunes whose rows 0 … shape[0] - 1 have deltas to the base
    whole: tuple[str, ...]  # fine-tunes that have it in full, or as the base's if equal

    @property
    def size(self) -> int:
        return torch.Size(self.shape or ()).numel() if self.shape is not None else 0


def items(
    base: Source, tunes: Sequence[Source], skip: Callable[[str], bool], embeddings: bool = True, vectors: bool = False
) -> list[Item]:  # fmt: skip
    """Every tensor, from headers alone; shapes that do not fit are refused, but for a vocabulary that grew or shrank.

    `skip` names tensors that are not masked; `embeddings` False adds embedding and head to them. `vectors`: those with one
    dimension are masked too.
    """
    for tune in tunes:
        saw, want = tune.config.get("model_type"), base.config.get("model_type")
        if saw != want:
            raise CompressError(f"{tune.name}: a {saw} model, the base is {want}", hint="fine-tunes of one base belong together")
    exempt = set() if embeddings else base.embeddings
    found = []
    for name in base.names:
        shape = base.view.shape(name)
        floats = base.view.dtype(name) in dtypes.FLOATS and (len(shape) >= 2 or (vectors and len(shape) == 1))
        can = floats and name not in exempt and not skip(name)
        masked: list[str] = []
        whole: list[str] = []
        for tune in tunes:
            if name in tune.names:
                fits = _fits(name, shape, base, tune)
                (masked if can and fits and tune.view.dtype(name) in dtypes.FLOATS else whole).append(tune.name)
        found.append(Item(name, shape, tuple(masked), tuple(whole)))
    known = set(base.names)
    for name in dict.fromkeys(n for tune in tunes for n in tune.names if n not in known):
        found.append(Item(name, None, (), tuple(t.name for t in tunes if name in t.names)))
    return found


def _fits(name: str, shape: tuple[int, ...], base: Source, tune: Source) -> bool:
    """Whether a fine-tune has all rows of the base's tensor. Another shape than a vocabulary's is refused."""
    own = tune.view.shape(name)
    if own == shape:
        return True
    if name in base.embeddings and len(own) == len(shape) and own[1:] == shape[1:]:
        return own[0] > shape[0]
    raise CompressError(
        f"{tune.name}: {name} has shape {list(own)}, the base has {list(shape)}",
        hint="it is a fine-tune of another base, or the wrong base was given",
    )


# -- reading in step -------------------------------------------------------------------------------------------------------


def steps(shape: tuple[int, ...], copies: int) -> Iterator[tuple[int, int]]:
    """Runs of rows of a tensor such that `copies` of a run fit the room."""
    rows, columns = matrix(shape)
    step = max(1, ROOM // max(1, columns * copies))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def pieces(base: Source, tunes: Sequence[Source], item: Item, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The base's rows (R, C) and the deltas of some fine-tunes (T, R, C), both fp32, piece by piece."""
    assert item.shape is not None
    for start, stop in steps(item.shape, 3 * len(tunes) + 8):
        W0 = base.view.read_slice(item.name, start, stop).float().to(device)
        tau = torch.empty(len(tunes), *W0.shape, dtype=torch.float32, device=device)
        for i, tune in enumerate(tunes):
            torch.sub(tune.view.read_slice(item.name, start, stop).float().to(device), W0, out=tau[i])
        if not bool(torch.isfinite(tau.sum())) and not bool(torch.isfinite(tau).all()):
            raise CompressError(f"{item.name}: a delta is NaN or Inf", hint="a fine-tune's weights are out of range")
        yield W0, tau


def equal_to_base(base: Source, tune: Source, name: str) -> bool:
    """Whether a fine-tune has the base's tensor, bit for bit."""
    if base.view.dtype(name) != tune.view.dtype(name) or base.view.shape(name) != tune.view.shape(name):
        return False
    return all(torch.equal(a, b) for a, b in zip(base.view.chunks(name), tune.view.chunks(name), strict=True))


def refuse_duplicates(base: Source, tunes: Sequence[Source], found: Sequence[Item]) -> None:
    """Refuse two fine-tunes with the same weights: their masks would be empty or wrong. Near ones get a warning.

    First a row of every tensor is compared, and all of it only where those agree.
    """
    probes: dict[str, list[torch.Tensor]] = {t.name: [] for t in tunes}
    for item in found:
        if len(item.masked) == len(tunes) and item.shape is not None:
            W0 = base.view.read_slice(item.name, 0, 1).float()
            for tune in tunes:
                probes[tune.name].append((tune.view.read_slice(item.name, 0, 1).float() - W0).flatten())
    joined = {name: torch.cat(rows) if rows else torch.empty(0) for name, rows in probes.items()}
    for a, b in itertools.combinations(tunes, 2):
        x, y = joined[a.name], joined[b.name]
        if torch.equal(x, y) and _digest(a, found) == _digest(b, found):
            raise CompressError(
                f"{a.name} and {b.name} are the same fine-tune", hint="give each one once: copies would spoil the masks of all"
            )
        least = min(float(x.square().sum()), float(y.square().sum()))
        if least > 0 and float((x - y).square().sum()) < _NEAR * least:
            logger.warning("%s and %s are nearly the same: masks of near copies lose much; bundle one of them", a.name, b.name)


def _digest(tune: Source, found: Sequence[Item]) -> str:
    """sha256 over every tensor's values."""
    total = hashlib.sha256()
    for item in found:
        if tune.name in (*item.masked, *item.whole):
            for piece in tune.view.chunks(item.name):
                total.update(piece.float().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


# -- thresholds over the whole model ---------------------------------------------------------------------------------------


def thresholds(base: Source, tunes: Sequence[Source], found: Sequence[Item], density: float, device: str) -> Trim:
    """TIES' thresholds, one per fine-tune, exact, and the majority of the elected signs: three passes over the deltas."""
    wanted = [i for i in found if len(i.masked) == len(tunes)]
    total = sum(i.size for i in wanted)
    rank = _taskmask.cut(total, density)

    def count(prefix: Sequence[int | None]) -> list[torch.Tensor]:
        counts = [torch.zeros(1 << 16, dtype=torch.int64) for _ in tunes]
        for item in wanted:
            for _, tau in pieces(base, tunes, item, device):
                for i, t in enumerate(tau):
                    counts[i] += _taskmask.bins(t, prefix[i])
        return counts

    high = [_taskmask.at_rank(c, rank) for c in count([None] * len(tunes))]
    low = [_taskmask.at_rank(c, inner)[0] for c, (_, inner) in zip(count([h for h, _ in high]), high, strict=True)]
    limits = [_taskmask.from_bins(h, lower) for (h, _), lower in zip(high, low, strict=True)]
    signs = 0.0
    for item in wanted:
        for _, tau in pieces(base, tunes, item, device):
            signs += float(_taskmask.trimmed(tau, limits).sum(0).sign().sum(dtype=torch.float64))
    return limits, float((signs > 0) - (signs < 0))


def named(tunes: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str | Path]:
    """Task names of fine-tunes: as given ("name=folder", or a mapping), else the folder's own name."""
    found: dict[str, str | Path] = {}
    pairs = tunes.items() if isinstance(tunes, Mapping) else [_named(t) for t in tunes]
    for name, path in pairs:
        if name in found:
            raise CompressError(f"two fine-tunes are called {name}", hint="name them: NAME=FOLDER", usage=True)
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith(".") or name == "all":
            raise CompressError(f"{name!r} is no name for a task", hint="letters, digits, - _ and .: NAME=FOLDER", usage=True)
        found[name] = path
    if not found:
        raise CompressError("no fine-tune was given", hint="compress bundle BASE FINETUNE…", usage=True)
    return found


def _named(tune: str | Path) -> tuple[str, str | Path]:
    text = str(tune)
    name, equals, path = text.partition("=")
    if equals and "/" not in name:
        return name, path
    folder = Path(text).expanduser()
    return (folder.resolve().name if folder.is_dir() else text.rsplit("/", 1)[-1]), tune

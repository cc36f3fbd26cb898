"""What an artifact is (`describe`), and whether it is whole and right (`verify`, `verify_deep`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress import registry
from compress.checkpoint import dtypes, manifest, source, unpacked
from compress.checkpoint.reader import CheckpointReader, read_json
from compress.errors import CompressError
from compress.formats import lowrank_sparse
from compress.formats._where import loads
from compress.loading import load
from compress.models import rotate
from compress.models.skeleton import Skeleton, load_config
from compress.modules import CompressedWeight, TiedLinear
from compress.types import Packed


@dataclass(frozen=True, slots=True)
class Description:
    """The facts that `compress inspect` prints."""

    name: str
    method: str
    format: str
    config: dict[str, Any]
    linears: int
    bits_linears: float  # bits per weight of the compressed linears
    bits_model: float  # of the whole model, embeddings and norms included
    bytes: int
    source_bytes: int | None
    parameters: int
    worst: list[tuple[str, float]]
    mean_error: float
    where: list[tuple[str, str]]
    search: list[dict[str, Any]]
    widths: dict[str, dict[int, int]]  # last part of a linear's name -> bits -> how many linears, where bits differ
    zeros: dict[str, tuple[float, float]]  # last part of a linear's name -> least and greatest share of zeros
    patterns: list[str]  # N:M that the linears keep
    pruned: dict[str, Any] | None  # method and config of the pruning before a quantization
    factors: dict[str, tuple[int, int, int, int]]  # last part of a linear's name -> least and greatest rank, columns
    kept: float | None  # share of the factorized linears' parameters
    heads: list[dict[str, Any]]  # embedding and head where they are rounded: name, bits, error, bytes, and those at 16 bits
    report: dict[str, Any] | None


def describe(folder: Path) -> Description:
    """Read an artifact's manifest and headers."""
    known = manifest.read(folder)
    reader = CheckpointReader(folder)
    linears: dict[str, dict[str, Any]] = known["linears"]
    weights = {n: e["shape"][0] * e["shape"][1] for n, e in linears.items()}
    compressed = sum(weights.values())
    stored = sum(e.nbytes for e in reader.entries.values())
    packed = manifest.stored(known)
    dense = sum(math.prod(e.shape) for n, e in reader.entries.items() if n.rsplit(".", 1)[0] not in packed)
    dense += sum(math.prod(reader.shape(f"{n}.bias")) for n in packed if f"{n}.bias" in reader)
    dense += sum(math.prod(e["shape"]) for e in known.get("heads", {}).values())
    errors = sorted(((n, e["error"]) for n, e in linears.items()), key=lambda t: -t[1])
    report = folder / "report.json"
    return Description(
        known["source"]["name"], known["method"], known["format"], known["config"], len(linears),
        sum(e["bits"] * weights[n] for n, e in linears.items()) / max(compressed, 1), 8 * stored / (compressed + dense), stored,
        known["source"].get("weight_bytes"), compressed + dense, errors[:5],
        sum(e for _, e in errors) / max(len(errors), 1),
        loads(read_json(folder / "config.json")), known["search"], _widths(linears), *_zeros(linears),
        known["source"].get("pruned"), *_factors(linears), _heads(known), read_json(report) if report.exists() else None,
    )  # fmt: skip


def _heads(known: dict[str, Any]) -> list[dict[str, Any]]:
    """Embedding and head, where they are rounded."""
    rows = []
    for name, entry in known.get("heads", {}).items():
        size = math.prod(entry["shape"])
        rows.append({
            "name": name, "bits": entry["params"]["bits"], "error": entry["error"], "bytes": round(size * entry["bits"] / 8),
            "bytes_at_16_bits": 2 * size,
        })  # fmt: skip
    return rows


def _factors(linears: dict[str, dict[str, Any]]) -> tuple[dict[str, tuple[int, int, int, int]], float | None]:
    """Ranks and columns by the last part of the names, and the share of the parameters that is left, if any were factorized."""
    found: dict[str, list[tuple[int, int]]] = {}
    values = weights = 0
    for name, entry in linears.items():
        params, shape = entry["params"], (int(entry["shape"][0]), int(entry["shape"][1]))
        if entry["kind"] == lowrank_sparse.KIND:
            found.setdefault(name.rsplit(".", 1)[-1], []).append((params["rank"], params["columns"]))
            values, weights = values + lowrank_sparse.parameters(params, shape), weights + math.prod(shape)
    spans = {part: tuple(pick(v) for v in zip(*rows, strict=True) for pick in (min, max)) for part, rows in found.items()}
    return spans, values / weights if weights else None  # type: ignore[return-value]


def _widths(linears: dict[str, dict[str, Any]]) -> dict[str, dict[int, int]]:
    """How many linears of each name have which bits; empty where all are equal."""
    out: dict[str, dict[int, int]] = {}
    for name, entry in linears.items():
        counts = out.setdefault(name.rsplit(".", 1)[-1], {})
        bits = entry["params"].get("bits", 0)
        counts[bits] = counts.get(bits, 0) + 1
    return out if len({bits for counts in out.values() for bits in counts}) > 1 else {}


def _zeros(linears: dict[str, dict[str, Any]]) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Shares of zeros by name, as they were counted when the artifact was written, and patterns."""
    out: dict[str, tuple[float, float]] = {}
    for name, entry in linears.items():
        if "density" in entry:
            part, share = name.rsplit(".", 1)[-1], 1 - entry["density"]
            low, high = out.get(part, (share, share))
            out[part] = min(low, share), max(high, share)
    return out, sorted({f"{e['params']['n']}:{e['params']['m']}" for e in linears.values() if "n" in e["params"]})


@dataclass(frozen=True, slots=True)
class Choice:
    """Linears that run alike on this machine."""

    path: str
    what: str  # kind and settings
    linears: list[str]
    others: dict[str, str]  # every other path -> why it does not run


def explain(folder: Path, dtype: str | None = None) -> tuple[dict[str, Any], list[Choice]]:
    """What decides this machine's paths, and which of them each compressed linear takes; loads the model."""
    from compress_kernels import dispatch

    model = load(folder, dtype=dtype)
    found: dict[str, Choice] = {}
    for name, module in model.named_modules():
        if isinstance(module, CompressedWeight) and module.prepared is not None and not isinstance(module, TiedLinear):
            settings = ", ".join(f"{k}={v}" for k, v in module.params.items() if k not in ("nnz", "outliers", "rank", "columns"))
            others = module.passed_over()
            key = str((module.path, module.kind, settings, others))
            found.setdefault(key, Choice(module.path, f"{module.kind} {settings}".strip(), [], others)).linears.append(name)
    table = dispatch.path()
    facts = {**dispatch.machine(), "activations": str(model.dtype).removeprefix("torch."), "table": str(table)}
    decoding = getattr(model, "decoding", None)
    facts["decoding"] = "transformers (it is not compressed)" if decoding is None else decoding.path
    return {**facts, "tuned": bool(dispatch.read(table))}, list(found.values())


def verify(folder: Path) -> list[str]:
    """Problems of an artifact: files against the manifest, tensors against their format and the model, finite values."""
    known = manifest.read(folder)
    problems = manifest.check_files(folder, known)
    if problems:
        return problems
    reader = CheckpointReader(folder)
    expected: dict[str, tuple[str | None, tuple[int, ...]]] = {n: (None, reader.shape(n)) for n in known["extra"] if n in reader}
    skeleton = _skeleton(folder)
    floats = {n.rpartition(".")[0]: reader.dtype(n) for n in reader.names if _is_float(reader, n)}
    for name, shape in skeleton.parameters().items():
        entry = manifest.stored(known).get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if entry is None or entry["kind"] == "dense":
            expected[name] = (None, shape)
        else:
            linear = name.removesuffix(".weight")
            try:
                spec = registry.by_kind(entry["kind"]).spec(entry["params"], tuple(entry["shape"]), floats.get(linear, "F16"))
            except (KeyError, TypeError, ValueError) as error:
                hint = "it was edited: copy the artifact again"
                raise CompressError(f"manifest.json: {linear} has params {entry['params']}", hint=hint) from error
            expected |= {f"{name.removesuffix('.weight')}.{suffix}": want for suffix, want in spec.items()}
    derived = {n for n, _ in skeleton.model.named_buffers()}
    problems += [f"{n}: missing" for n in sorted(expected.keys() - set(reader.names) - derived)]
    problems += [f"{n}: unexpected tensor" for n in sorted(set(reader.names) - expected.keys())]
    for name in reader.names:
        if name not in expected:
            continue
        dtype, want = expected[name]
        if reader.shape(name) != want or dtype not in (None, reader.dtype(name)):
            problems.append(f"{name}: {reader.dtype(name)} {reader.shape(name)}, its format asks for {dtype or 'any dtype'} {want}")
        elif reader.dtype(name) in dtypes.FLOATS and not all(dtypes.finite(p) for p in reader.chunks(name)):
            problems.append(f"{name}: holds NaN or Inf")
    if not problems:
        for linear, entry in manifest.stored(known).items():
            module = registry.by_kind(entry["kind"])
            if entry["version"] != module.VERSION:
                problems.append(f"{linear}: {entry['kind']} version {entry['version']}, this program writes {module.VERSION}")
            elif hasattr(module, "problems"):
                problems += [f"{linear}: {why}" for why in module.problems(_packed(reader, linear, entry))]
            elif entry["kind"] == "dense" and "n" in entry["params"] and "b_in" not in entry["params"]:
                problems += _violations(unpack(reader, linear, entry, f"{linear}.weight" in skeleton.conv1d_weights), linear, entry)
    return problems


def _violations(W: torch.Tensor, linear: str, entry: dict[str, Any]) -> list[str]:
    """One problem where a dense weight (O, I) has groups that its pattern does not allow."""
    n, m = int(entry["params"]["n"]), int(entry["params"]["m"])
    if m < 1 or W.shape[1] % m:
        return [f"{linear}: {W.shape[1]} inputs cannot be split into groups of {m}"]
    wrong = int(((W != 0).view(len(W), -1, m).sum(2) > n).sum())
    return [f"{linear}: {wrong} groups hold more than {n} of {m} weights"] if wrong else []


def _is_float(reader: CheckpointReader, name: str) -> bool:
    """Whether a tensor tells the dtype that a compressed linear's float tensors have."""
    return reader.dtype(name) in dtypes.FLOATS and not name.endswith(".bias")


def _skeleton(folder: Path) -> Skeleton:
    """The dense model's skeleton of an artifact."""
    return Skeleton(load_config(folder, compressed=True))


def unpack(reader: CheckpointReader, name: str, entry: dict[str, Any], transposed: bool = False) -> torch.Tensor:
    """The dense weight (O, I) of one linear of an artifact, fp32; `transposed` where the model stores (I, O)."""
    if entry["kind"] == "dense":
        W = reader.read(f"{name}.weight").float()
        return W.T.contiguous() if transposed else W
    dense: torch.Tensor = registry.by_kind(entry["kind"]).dequantize(_packed(reader, name, entry))
    return dense


def _packed(reader: CheckpointReader, name: str, entry: dict[str, Any]) -> Packed:
    """One compressed linear of an artifact."""
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    suffixes = registry.by_kind(entry["kind"]).spec(entry["params"], shape, "F16")
    return Packed(entry["kind"], entry["version"], entry["params"], {s: reader.read(f"{name}.{s}") for s in suffixes}, shape)


def verify_deep(folder: Path, model: str | Path) -> list[str]:
    """Problems found by dequantizing every linear and comparing it with the source checkpoint.

    A rotated artifact is compared with the rotated source. Methods that move scales between operators change W to
    diag(1/r) W diag(c): r and c are fitted first. The relative error that remains must not exceed what the manifest recorded.
    """
    known = manifest.read(folder)
    if not known["source"]["files"]:
        raise CompressError(f"{folder}: trained, not made from a checkpoint: there is no source", hint="leave --deep out")
    origin = source.resolve(model)
    reader = CheckpointReader(folder)
    method = registry.load("methods", known["method"])
    rotation = method.transform(method.Config(**known["config"])) if hasattr(method, "transform") else None
    before = unpacked.read(origin)
    skeleton, view = rotate.open_model(origin, load_config(origin, compressed=before is not None), rotation, known=before)
    for name, digest in source.hashes(origin, view.reader.files()).items():
        if known["source"]["files"].get(name, digest) != digest:
            if "pruned" in known["source"] and before is None:
                raise CompressError(
                    f"{folder}: made from a pruned artifact, {origin} is a dense checkpoint",
                    hint="give the pruned artifact; the same prune command without --then-bits makes it again, byte for byte",
                )
            raise CompressError(
                f"{origin / name}: not the file that this artifact was made from", hint="give the very same checkpoint"
            )
    scaled = {n for row in known["search"] for n in _scaled(row)}
    problems = []
    for name, entry in manifest.stored(known).items():
        transposed = f"{name}.weight" in skeleton.conv1d_weights
        W = view.read(f"{name}.weight").float()
        W = W.T.contiguous() if transposed else W
        meant = view.sparsity.get(name)
        if meant is not None and meant.wrapped is not None:  # the source is read as ARMOR's core, too
            W_hat = registry.pruned(_packed(reader, name, entry))
        else:
            W_hat = unpack(reader, name, entry, transposed)
        error = _distance(W_hat, W, fit=any(name.endswith(f".{row}") for row in scaled))
        if not error <= entry["error"] * 1.02 + 1e-4 + (2e-3 if entry["kind"] == "dense" else 0):
            problems.append(f"{name}: {error:.4g} from the source, the manifest says {entry['error']:.4g}")
    return problems


def _scaled(row: dict[str, Any]) -> set[str]:
    """Relative names of the linears that a block's search rescaled."""
    return {n for m in row.get("scales", []) for n in (m["producer"], *m["consumers"])}


def _distance(W_hat: torch.Tensor, W: torch.Tensor, fit: bool) -> float:
    """|W_hat - W| / |W|, after fitting row and column scales of W to W_hat where asked."""
    if fit:
        for _ in range(6):
            for dim in (0, 1):
                scale = (W_hat * W).sum(dim, keepdim=True) / W.square().sum(dim, keepdim=True).clamp(min=1e-30)
                W = W * scale
    return float(torch.linalg.vector_norm(W_hat - W) / torch.linalg.vector_norm(W).clamp(min=1e-30))

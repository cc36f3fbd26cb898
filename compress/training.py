"""LOST's layers for training (arXiv 2508.02668): `convert` puts them into a model, `save` makes an artifact of the trained one.

    y = gamma * B SiLU(A x) + (1 - gamma) * W_s x_I + b

A `LostLinear` is an ordinary module: transformers' Trainer, accelerate or a plain loop train it. Its columns I and gamma are
fixed; A, B, W_s and b have gradients. Give the sparse values the learning rate and decay of the factors, not those of the norms.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from compress_kernels.lost import reference
from torch import nn

from compress.checkpoint import dtypes
from compress.checkpoint.writer import MAX_SHARD, CheckpointWriter, Planned
from compress.errors import CompressError
from compress.fit import TOOL, versions
from compress.formats import lost
from compress.methods import _lost
from compress.models.skeleton import Skeleton
from compress.modules import linear_shape, place
from compress.pipeline import artifact
from compress.pipeline.layout import Layout, Target
from compress.pipeline.resume import WorkDir, fingerprint
from compress.types import Packed, Wrappers

logger = logging.getLogger(__name__)
METHOD = "lost-layers"  # in the manifest, where the method of a compressed artifact stands


class LostLinear(nn.Module):
    """x (..., I) -> (..., O); A (r, I), B (O, r), W_s (O, s), columns (s,) int64 ascending, bias (O,) or None.

    gamma = 1 without columns is a low-rank layer with SiLU. The forward pass is the kernel's reference.
    """

    def __init__(
        self, factors: _lost.Factors, gamma: float = 0.7, bias: torch.Tensor | None = None, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = len(factors.B), int(factors.A.shape[1])
        self.params: dict[str, Any] = {
            "rank": len(factors.A), "kept": len(factors.columns), "gamma": float(gamma), "activation": activation,
        }  # fmt: skip
        why = reference.unfit(self.params, self.shape)
        if why is not None:
            raise CompressError(why, hint="use another rank, delta or gamma", usage=True)
        self.A, self.B, self.W_s = (nn.Parameter(t.detach().clone()) for t in (factors.A, factors.B, factors.W_s))
        self.register_buffer("columns", factors.columns.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.out_features, self.in_features

    def tensors(self) -> dict[str, torch.Tensor]:
        """A, B, W_s and columns, as they are trained."""
        return {"A": self.A, "B": self.B, "W_s": self.W_s, "columns": self.columns}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.linear(x, self.tensors(), self.params, self.bias)

    def pack(self, dtype: torch.dtype) -> Packed:
        """The layer as it is stored, factors rounded to a 16-bit `dtype`."""
        A, B, W_s = (t.detach().cpu().to(dtype) for t in (self.A, self.B, self.W_s))
        return lost.pack(A, B, self.columns.cpu(), W_s, gamma=self.params["gamma"], activation=self.params["activation"])

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, " + ", ".join(f"{key}={value}" for key, value in self.params.items())


def linears(model: Any) -> dict[str, nn.Module]:
    """Full name -> module of every linear of a transformers model's blocks; embeddings and head are not among them."""
    skeleton = Skeleton(model.config)
    names = [skeleton.prefix(i) + name for i in range(len(skeleton.blocks)) for name in skeleton.linears(i)]
    return {name: model.get_submodule(name) for name in names}


def parameters(shape: tuple[int, int], rank: int, kept: int) -> int:
    """Trained values of a layer (O, I), without bias: r(O + I) + s·O."""
    return rank * sum(shape) + kept * shape[0]


def convert(
    model: Any,
    rank: int | Mapping[str, int],
    delta: float = 0.05,
    gamma: float = 0.7,
    *,
    band: int | None = None,
    start: str = "svd",
    seed: int = 0,
    dense: Collection[str] = (),
) -> dict[str, LostLinear]:
    """Replace every linear of a freshly initialised model's blocks by a LOST layer, in place; returns them by name.

    `rank` is one number (capped at a linear's own), or one per linear by full name. `delta` is the share of input columns kept, 0
    for none. `band` is the number of singular triplets after the first `rank` that the columns are chosen by (all of them; the
    author's setting is 256). `start` is "svd" (the paper's), or "cola", random factors with the same columns. Linears named in
    `dense` stay. The full-rank weights are gone afterwards.
    """
    if start not in ("svd", "cola"):
        raise CompressError(f"start {start!r} is unknown", hint="use svd or cola", usage=True)
    if not 0 <= delta <= 1:
        raise CompressError(f"delta {delta} is no share of the columns", hint="the paper's is 0.05", usage=True)
    if band is not None and band < 1:
        raise CompressError(f"band {band}: at least one singular triplet is needed", hint="256 is the author's", usage=True)
    found = linears(model)
    unknown = sorted({*dense, *(rank if isinstance(rank, Mapping) else ())} - found.keys())
    if unknown:
        raise CompressError(f"{unknown[0]} is no linear of the model's blocks", hint=f"names look like {next(iter(found))}")
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in found.items():
        shape = linear_shape(module)
        if name in dense or shape is None:
            continue
        own = rank[name] if isinstance(rank, Mapping) else min(rank, *shape)
        made[name] = _layer(name, module, shape, (own, _lost.kept(shape[1], delta), gamma), band, start, generator)
        place(model, name, made[name])
    return made


def _layer(
    name: str, module: nn.Module, shape: tuple[int, int], size: tuple[int, int, float], band: int | None, start: str,
    generator: torch.Generator,
) -> LostLinear:  # fmt: skip
    """One linear's successor, of `size` (rank, columns, gamma)."""
    rank, count, gamma = size
    if not 1 <= rank <= min(shape):
        why = f"{name}: rank {rank} of a linear of {shape[0]} x {shape[1]}"
        raise CompressError(why, hint=f"use 1 to {min(shape)}", usage=True)
    if parameters(shape, rank, count) > shape[0] * shape[1]:
        logger.warning("%s: rank %d and %d columns take more parameters than the dense weight", name, rank, count)
    W = module.weight.detach()
    W = W if isinstance(module, nn.Linear) else W.T  # Conv1D
    if not dtypes.finite(W):
        raise CompressError(f"{name}: its weight holds NaN or Inf", hint="initialise the model again")
    factors = _lost.initialise(W, rank, count, band)
    if start == "cola":
        A, B = _lost.cola(shape, rank, generator)
        factors = dataclasses.replace(factors, A=A.to(W), B=B.to(W))
    return LostLinear(factors, gamma, module.bias)


def save(
    model: Any,
    out: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    max_shard_size: int = MAX_SHARD,
) -> Path:
    """Write a model with LOST layers as an artifact, which `compress.load` and the commands read; returns the folder.

    Dense tensors are stored in `dtype` (the model's own), factors in the same, or float16 where it is float32. `config` and `seed`
    are what the manifest shall say of the training. OUT appears by one rename. NaN or Inf stops with the tensor's name.
    """
    out = Path(out)
    if out.exists():
        raise CompressError(f"{out}: exists", hint="choose another folder, or remove it")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LostLinear)}
    if not layers:
        raise CompressError("the model has no LOST layer", hint="compress.training.convert makes them; else use save_pretrained")
    dtype = dtype or model.dtype
    skeleton = Skeleton(model.config)
    layout = _layout(skeleton, layers, dtypes.NAME[dtype])
    state = model.state_dict()
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    facts = _facts(model, dict(config or {}), seed)
    job = fingerprint({**facts, "dtype": str(dtype), "shard": max_shard_size, "linears": {n: m.params for n, m in layers.items()}})
    work = WorkDir(out.absolute().with_name(f"{out.absolute().name}.partial"), job, restart=True)
    try:
        writer = CheckpointWriter(work.artifact, layout.plan, max_shard_size)
        writer.open(fresh=True)
        records = {}
        for name, layer in layers.items():
            packed = _packed(name, layer, layout.scale_dtype)
            records[name] = _record(layer, packed)
            for suffix, tensor in packed.tensors.items():
                writer.write(f"{name}.{suffix}", tensor)
        for planned in layout.plan:
            if planned.name.rpartition(".")[0] not in layers or planned.name.endswith(".bias"):
                writer.write(planned.name, state[planned.name].to("cpu", dtypes.TORCH[planned.dtype]))
        writer.finish()
        with tempfile.TemporaryDirectory(dir=work.path) as companions:
            _companions(model, tokenizer, dtype, Path(companions))
            name = facts["source"]["name"]
            artifact.write_companions(Path(companions), work.artifact, layout, skeleton, METHOD, name, untied=False)
        artifact.write_manifest(work.artifact, {**facts, "job": job, "format": layout.name, "linears": records, "search": []})
        work.publish(out, keep=False, replace=False)
    finally:
        work.close()
    return out


def _packed(name: str, layer: LostLinear, dtype: torch.dtype) -> Packed:
    """A layer as it is stored; what is wrong with it is said with its name."""
    try:
        return layer.pack(dtype)
    except CompressError as error:
        raise CompressError(f"{name}: {error.message}", hint=error.hint) from error


def _layout(skeleton: Skeleton, layers: Mapping[str, LostLinear], dtype: str) -> Layout:
    """The plan of the artifact: a `lost` linear in each place, everything else dense in safetensors dtype `dtype`."""
    conv1d = skeleton.conv1d_weights
    targets = {
        name: Target(name, layer.shape, f"{name}.weight" in conv1d, dtype, layer.params, lost.KIND)
        for name, layer in layers.items()
    }
    plan: list[Planned] = []
    for name, shape in skeleton.parameters().items():
        target = targets.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if target is None:
            plan.append(Planned(name, dtype, shape))
        else:
            spec = lost.spec(target.params, target.shape, dtype)
            plan += [Planned(f"{target.name}.{suffix}", own, size) for suffix, (own, size) in spec.items()]
    return Layout(lost.KIND, lost.KIND, targets, tuple(plan), True, None, _no_wrappers)


def _no_wrappers(name: str) -> Wrappers:
    raise AssertionError(f"{name} is no armor linear")


def _record(layer: LostLinear, packed: Packed) -> dict[str, Any]:
    """One linear's row of the manifest; its error is that of rounding the trained values for storage."""
    A, B, _, W_s = lost.unpack(packed)
    pairs = [(a.detach().cpu().float(), b.float()) for a, b in ((layer.A, A), (layer.B, B), (layer.W_s, W_s))]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    error = (off / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-30)) ** 0.5
    facts = {"kind": packed.kind, "version": packed.version, "params": dict(packed.params), "shape": list(packed.shape)}
    return {**facts, "bits": lost.bits_per_weight(packed), "error": error}


def _facts(model: Any, config: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """The manifest's provenance: a model that was trained here has no source files, but a digest of its trained values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    origin = {"name": model.config.model_type, "revision": None, "files": {}, "weight_bytes": None, "sha256": digest.hexdigest()}
    return {
        "tool": f"{TOOL} {versions()[TOOL]}", "source": origin, "method": METHOD, "config": config, "seed": seed,
        "calibration_sha256": None, "versions": versions(), "extra": [],
    }  # fmt: skip


def _companions(model: Any, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """config.json, generation config and tokenizer as they lie beside a dense checkpoint, without a path."""
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.name_or_path = ""
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

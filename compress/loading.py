"""A folder becomes a model: our artifacts, llm-compressor's pack-quantized, AutoAWQ's gemm, ordinary checkpoints.

The model is built on `meta`, its compressed linears are replaced by `CompressedLinear`, and the tensors are read one by one into
their places; each linear is prepared for its kernel, and gives up what that does not need, before the next is read. Before all
that every name, dtype and shape is held to the format's `spec`: nothing is initialised at random and nothing is ignored.
`register()` does the same inside transformers' own `from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress import decoding, devices, fusion, registry
from compress.checkpoint import dtypes, manifest, source
from compress.checkpoint.bundled import is_bundle
from compress.checkpoint.mapped import Place
from compress.checkpoint.reader import CheckpointReader, read_json
from compress.errors import CompressError
from compress.formats import awq
from compress.formats._schemes import OWN, Scheme, scheme_of, schemes, unsupported
from compress.models.auto import auto_class
from compress.models.skeleton import load_config
from compress.models.view import StoredTensors
from compress.modules import (
    CompressedEmbedding,
    CompressedLinear,
    CompressedWeight,
    TiedLinear,
    linear_shape,
    place,
    prepare,
    prepare_one,
)
from compress.pipeline import memory
from compress.types import Packed, TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_HOLES = 1 << 25  # weights whose remains are given back to the system together
_INCOMPLETE = "the folder is incomplete: copy it again"
_UNFIT = "the weights and config.json do not fit: was one of them edited or replaced?"


def load(
    path: str | Path, *, device: str | torch.device = "auto", dtype: torch.dtype | str | None = None, exact: bool | None = None,
    device_map: str | Mapping[str, Any] | None = None, task: str | None = None, base: str | Path | None = None,
) -> PreTrainedModel:  # fmt: skip
    """The language or vision-language model in a folder (or of a hub id), in eval mode; a dense folder gives the ordinary model.

    `device` "auto" is cuda where there is one, else the CPU. `dtype` defaults to the checkpoint's; on a CPU fp16 becomes bf16, or
    fp32 with `exact`, which keeps to kernels equal to the reference. `device_map` ("auto" or a dictionary) spreads the model over
    devices with accelerate, in place of `device`. Never runs code from the folder. Of a bundle, `task` gives that task's model
    (`set_task` switches it), None one for mixed batches (`set_tasks`); `base` is the bundle's base where it lies elsewhere.
    """
    register()
    folder = source.resolve(path)
    if is_bundle(folder):
        from compress.switching import load as load_bundle

        return load_bundle(folder, task, base, torch.device(devices.pick(device)), dtype, bool(exact), device_map)
    if task is not None:
        raise CompressError(f"{path}: not a bundle, so it has no task {task!r}", hint="leave the task out", usage=True)
    settings = read_json(folder / "config.json").get("quantization_config")
    reader = CheckpointReader(folder)
    device = devices.pick(device)
    config = load_config(folder, compressed=True)
    with _transformers_errors(folder):
        chosen = _dtype(dtype, config, torch.device(device), bool(exact))
        if settings is None:
            return _load_dense(folder, config, chosen, device_map or {"": device})
        model = _empty(config, chosen)
    _load_compressed(model, reader, settings, torch.device("cpu" if device_map else device), None if device_map else bool(exact))
    if device_map is not None:
        model = _dispatch(model, device_map)
        prepare(model, bool(exact))
    return _finish(decoding.attach(model), folder, settings)


@contextmanager
def _transformers_errors(folder: Path) -> Iterator[None]:
    """An unknown architecture, a missing file or remote code: transformers' message, without the traceback."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise CompressError(f"{folder}: transformers cannot load it: {why[0]}", hint="check config.json") from error


def _dtype(wanted: torch.dtype | str | None, config: Any, device: torch.device, exact: bool) -> torch.dtype:
    """The dtype of activations and dense weights; torch's fp16 matrix products are slow on most CPUs."""
    if wanted is not None:
        found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise CompressError(f"unknown dtype {wanted!r}", hint="use float32, bfloat16 or float16", usage=True)
        return found
    own: torch.dtype = config.dtype or config.get_text_config().dtype or torch.float32
    if own == torch.float16 and device.type == "cpu":
        return torch.float32 if exact else torch.bfloat16
    return own


def _empty(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on meta, with real buffers (rotary frequencies are in no checkpoint)."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)


def _load_dense(folder: Path, config: PretrainedConfig, dtype: torch.dtype, device_map: Any) -> PreTrainedModel:
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    model, info = auto_class(config).from_pretrained(folder, dtype=dtype, device_map=device_map, **options)
    if info["missing_keys"]:
        raise CompressError(f"{folder}: tensor {min(info['missing_keys'])} is missing", hint=_INCOMPLETE)
    return model.eval()


def _dispatch(model: PreTrainedModel, device_map: str | Mapping[str, Any]) -> PreTrainedModel:
    """Spread a model that is on the CPU; the weights of compressed linears are buffers, so those are offloaded too."""
    from accelerate import dispatch_model, infer_auto_device_map

    if device_map == "auto":
        whole = list(model._no_split_modules or ())
        device_map = infer_auto_device_map(model, no_split_module_classes=whole, offload_buffers=True)
    places = {"": device_map} if isinstance(device_map, str) else dict(device_map)
    try:
        return dispatch_model(model, device_map=places, offload_buffers=True)
    except ValueError as error:
        raise CompressError(f"device_map: {error}", hint='use device_map="auto"') from error


def _finish(model: PreTrainedModel, folder: Path, settings: Mapping[str, Any]) -> PreTrainedModel:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder)
    if settings.get("quant_method") != "awq":  # AWQ linears have become int_grouped
        model.config.quantization_config = dict(settings)
    return model.eval()


@dataclass(frozen=True, slots=True)
class _Linear:
    """A compressed linear of the artifact, held to its format's spec."""

    scheme: Scheme
    shape: tuple[int, int]
    stored: str  # safetensors dtype of its float tensors
    suffixes: tuple[str, ...]


def _plan(model: PreTrainedModel, tensors: StoredTensors, settings: Mapping[str, Any]) -> dict[str, _Linear]:
    """The compressed linears, each checked: those under whose name tensors lie, but no `weight`."""
    groups = schemes(settings)
    own: dict[str, set[str]] = {}
    for name in tensors.names:
        linear, _, suffix = name.rpartition(".")
        own.setdefault(linear, set()).add(suffix)
    plan = {}
    for name, module in model.named_modules():
        shape, suffixes = _shape(module), own.get(name, set()) - {"bias"}
        if shape is not None and suffixes and "weight" not in suffixes:
            found = {suffix: tensors.spec(f"{name}.{suffix}") for suffix in suffixes}
            plan[name] = _check(name, _completed(scheme_of(name, module, groups), found), shape, found)
    return plan


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, I) of a linear, (V, D) of an embedding, None for any other module."""
    return (module.num_embeddings, module.embedding_dim) if isinstance(module, nn.Embedding) else linear_shape(module)


def _completed(scheme: Scheme, found: Mapping[str, TensorSpec]) -> Scheme:
    """The scheme with the params that only a linear's own tensors tell."""
    module = registry.by_kind(scheme.kind)
    return replace(scheme, params=module.complete(scheme.params, found)) if hasattr(module, "complete") else scheme


def _check(name: str, scheme: Scheme, shape: tuple[int, int], found: Mapping[str, TensorSpec]) -> _Linear:
    size = scheme.params.get("group_size", -1)
    if not isinstance(size, int) or (size != -1 and (size < 1 or shape[1] % size)):
        raise CompressError(f"{name}: {shape[1]} inputs are no multiple of group_size {size}", hint=_UNFIT)
    stored = next((dtype for dtype, _ in found.values() if dtype in dtypes.FLOATS), "F16")
    wanted = registry.by_kind(scheme.kind).spec(scheme.params, shape, stored)
    for suffix in sorted(wanted.keys() | found.keys()):
        if suffix not in found:
            raise CompressError(f"tensor {name}.{suffix} is missing", hint=_INCOMPLETE)
        if suffix not in wanted:
            raise CompressError(f"tensor {name}.{suffix} is unexpected", hint=_UNFIT)
        if found[suffix] != wanted[suffix]:
            saw, want = (f"{dtype} {list(size)}" for dtype, size in (found[suffix], wanted[suffix]))
            raise CompressError(f"tensor {name}.{suffix} is {saw}, wanted {want}", hint=_UNFIT)
    return _Linear(scheme, shape, stored, tuple(wanted))


def _check_manifest(folder: Path) -> set[str]:
    """Refuse kinds and versions from the future; returns the tensors known to be in excess. Other tools write none."""
    if not (folder / manifest.FILE).is_file():
        return set()
    facts = manifest.read(folder)
    for name, record in manifest.stored(facts).items():
        kind, version, known = record["kind"], record["version"], registry.by_kind(record["kind"]).VERSION
        if version > known:
            raise CompressError(f"{name}: {kind} version {version}, this program reads up to {known}", hint="upgrade llm-compress")
    return set(facts.get("extra", ()))


def _replace(
    model: PreTrainedModel, reader: CheckpointReader, settings: Mapping[str, Any]
) -> tuple[StoredTensors, dict[str, _Linear], dict[str, torch.Tensor]]:
    """Put a CompressedLinear on meta in every place; returns the tensors, the linears and the dense tensors to read.

    Every name, dtype and shape has been checked when this returns.
    """
    excess = _check_manifest(reader.folder)
    tensors = StoredTensors(model, reader)
    plan = _plan(model, tensors, settings)
    packed, inner = set(), set()
    for name, linear in plan.items():
        _place(model, name, linear, tensors)
        packed |= {f"{name}.{suffix}" for suffix in linear.suffixes}
        inner |= {f"{name}.{suffix}" for suffix, _ in model.get_submodule(name).named_buffers()}
    fusion.attach(model)
    dense = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in inner}
    _check_names(model, tensors.names - packed - excess, dense)
    dense = {name: t for name, t in dense.items() if name in tensors.names}
    for name, tensor in dense.items():
        saw, want = list(tensors.spec(name)[1]), list(tensor.shape)
        if saw != want:
            raise CompressError(f"tensor {name} is {saw}, wanted {want}", hint=_UNFIT)
    return tensors, plan, dense


def _place(model: PreTrainedModel, name: str, linear: _Linear, tensors: StoredTensors) -> None:
    """A compressed module on meta in the place of a linear or an embedding; a head that is tied to an embedding follows it."""
    kind, module = "int_grouped" if linear.scheme.kind == awq.KIND else linear.scheme.kind, model.get_submodule(name)
    options: dict[str, Any] = {"stored": linear.stored, "dtype": model.dtype}
    model.all_tied_weights_keys.pop(f"{name}.weight", None)
    if not isinstance(module, nn.Embedding):
        place(model, name, CompressedLinear(kind, linear.scheme.params, linear.shape, bias=module.bias is not None, **options))
        return
    if kind != "int_grouped":
        raise unsupported(f"an embedding of kind {kind}")
    table = CompressedEmbedding(module, kind, linear.scheme.params, **options)
    place(model, name, table)
    for target in [t for t, own in model.all_tied_weights_keys.items() if own == f"{name}.weight"]:
        head = target.removesuffix(".weight")
        if not any(n.startswith(target) for n in tensors.names):  # else it has tensors of its own, though the config ties it
            del model.all_tied_weights_keys[target]
            place(model, head, TiedLinear(table, model.get_submodule(head).bias is not None))


def _load_compressed(
    model: PreTrainedModel, reader: CheckpointReader, settings: Mapping[str, Any], device: torch.device, exact: bool | None
) -> None:  # fmt: skip
    """Fill the empty model from the artifact, one linear or dense tensor at a time, the largest first; None: prepare nothing."""
    tensors, plan, dense = _replace(model, reader, settings)
    absent = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    holes = 0
    for name, linear in sorted(plan.items(), key=lambda item: -item[1].shape[0] * item[1].shape[1]):
        module = model.get_submodule(name)
        _fill_linear(module, name, linear, tensors, device)
        if exact is not None:
            prepare_one(name, module, exact)
            holes += linear.shape[0] * linear.shape[1]
        if holes > _HOLES:  # what a linear leaves behind in the heap, which the next ones do not fill
            memory.release()
            holes = 0
    memory.release()
    for name, meta in dense.items():
        tensor = tensors.read_as(name, meta.dtype, device)
        place(model, name, nn.Parameter(tensor, False) if isinstance(meta, nn.Parameter) else tensor)
    reader.close()
    model.tie_weights(missing_keys=absent - dense.keys(), recompute_mapping=False)
    for name, buffer in list(model.named_buffers()):  # those that are in no checkpoint were made on the CPU
        place(model, name, buffer.to(device))


def _check_names(model: PreTrainedModel, present: set[str], wanted: Mapping[str, torch.Tensor]) -> None:
    """Refuse missing and unexpected dense tensors. Tied copies may be missing, and buffers, which models derive."""
    missing = {name for name in wanted.keys() - present if isinstance(wanted[name], nn.Parameter)}
    tied = {a: b for pair in model.all_tied_weights_keys.items() for a, b in (pair, pair[::-1])}
    lost = sorted(name for name in missing if tied.get(name) not in present)
    if lost:
        raise CompressError(f"tensor {lost[0]} is missing ({len(lost)} such)", hint=_INCOMPLETE)
    harmless = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    extra = sorted(n for n in present - wanted.keys() if not any(re.search(pattern, n) for pattern in harmless))
    if extra:
        raise CompressError(f"tensor {extra[0]} is unexpected ({len(extra)} such)", hint=_UNFIT)


def _fill_linear(module: CompressedWeight, name: str, linear: _Linear, tensors: StoredTensors, device: torch.device) -> None:
    """Read one linear's tensors into its buffers; AWQ's become int_grouped's."""
    found: Mapping[str, torch.Tensor] = {suffix: tensors.read(f"{name}.{suffix}") for suffix in linear.suffixes}
    if linear.scheme.kind == awq.KIND:
        found = awq.to_int_grouped(Packed(awq.KIND, awq.VERSION, linear.scheme.params, found, linear.shape)).tensors
    if "weight_shape" in found and tuple(found["weight_shape"].tolist()) != linear.shape:
        saw, want = found["weight_shape"].tolist(), list(linear.shape)
        raise CompressError(f"tensor {name}.weight_shape holds {saw}, the model has {want}", hint=_UNFIT)
    for suffix, tensor in found.items():
        place(module, suffix, tensor.to(device))
    module.places = _places(name, linear, tensors)


def _places(name: str, linear: _Linear, tensors: StoredTensors) -> dict[str, Place]:
    """Where a linear's buffers lie on the disk; AWQ's are others."""
    if linear.scheme.kind == awq.KIND:
        return {}
    return {suffix: at for suffix in linear.suffixes if (at := tensors.place(f"{name}.{suffix}")) is not None}


def _guarded(settings: Any) -> bool:
    """Whether a quantization_config has a group that only this package reads."""
    groups = settings.get("config_groups") if isinstance(settings, Mapping) else None
    return any(str(g.get("format", "")).startswith(OWN) for g in (groups or {}).values() if isinstance(g, Mapping))


def register() -> None:
    """Teach transformers' `from_pretrained` our guarded artifacts; everything else goes the stock way."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer

    StockConfig: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    StockQuantizer: Any = auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    if hasattr(StockConfig, "compress_settings"):
        return

    class Config(StockConfig):
        compress_settings: Mapping[str, Any] = {}

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            inner = config_dict.get("quantization_config", config_dict)
            if not _guarded(inner):
                return StockConfig.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
            schemes(inner)  # refuses a bundle
            config = cls()
            config.compress_settings = dict(inner)
            return (config, kwargs) if return_unused_kwargs else config

        def to_dict(self) -> dict[str, Any]:
            return dict(self.compress_settings)

        to_diff_dict = to_dict

    class Quantizer(StockQuantizer):
        def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
            ours = isinstance(quantization_config, Config)
            return object.__new__(cls) if ours else StockQuantizer(quantization_config, **kwargs)

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            HfQuantizer.__init__(self, quantization_config, **kwargs)

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
            reader = CheckpointReader(Path(checkpoint_files[0]).parent)
            tensors, plan, _ = _replace(model, reader, self.quantization_config.compress_settings)
            for name, linear in plan.items():  # a parent's initialiser would look for the linear's weight (GPT-2)
                for part in (name, name.rpartition(".")[0]):
                    model.get_submodule(part)._is_hf_initialized = True
                model.get_submodule(name).places = _places(name, linear, tensors)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            prepare(model, exact=False)
            return decoding.attach(model)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = Config
    auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"] = Quantizer

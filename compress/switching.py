"""A bundle becomes a model: dense, of one task, switched in place (`load_task`); or of all tasks at once (`load_mixed`).

The dense model's tensors are reconstructed piece by piece from the base on the disk, at load and at every `model.set_task(name)`,
so that nothing drifts and memory is one model. The mixed model keeps the base's weights once, the shared vector and every task's
bits; each row of a batch is of one task, named by `model.set_tasks([…])` or `generate(tasks=[…])`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compress_kernels import masked_delta as kernel
from torch import nn

from compress import decoding, loading
from compress.checkpoint.bundled import BASE, MASKED, Bundle, BundledReader
from compress.checkpoint.reader import CheckpointReader
from compress.errors import CompressError
from compress.models.skeleton import Skeleton, load_config
from compress.models.view import CheckpointView
from compress.modules import place
from compress.tasklayers import PerTask, Rows, TaskEmbedding, TaskLinear, moved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OWN = (
    "vocab_size", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "pad_token_id", "bos_token_id", "eos_token_id",
    "use_cache",
)  # fmt: skip


def load(
    folder: Path, task: str | None, base: str | Path | None, device: torch.device, dtype: Any, exact: bool, device_map: Any = None
) -> PreTrainedModel:  # fmt: skip
    """The model of a bundle: dense and of one task, or without a task the mixed one."""
    if device_map is not None:
        raise CompressError(f"{folder}: a bundle cannot be spread over devices", hint="device=…, or compress extract", usage=True)
    bundle = Bundle(folder, base, task)
    if task is None:
        return load_mixed(bundle, device, dtype, exact)
    return load_task(bundle, task, device, dtype, exact)


# -- one task --------------------------------------------------------------------------------------------------------------


def load_task(bundle: Bundle, task: str, device: torch.device, dtype: Any, exact: bool) -> PreTrainedModel:
    """The dense model of a task, in eval mode, with `set_task(name)`, `task` and `tasks`."""
    from transformers import GenerationConfig

    reader = bundle.reader(task)
    with bundle.companions(task) as folder:
        config = load_config(folder)
        with loading._transformers_errors(bundle.folder):
            model = loading._empty(config, loading._dtype(dtype, config, device, exact))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    wanted = dict(model.state_dict(keep_vars=True))
    loading._check_names(model, _present(model, reader.names), wanted)
    absent = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    filled = set()
    for name, meta in wanted.items():
        if name in reader:
            shape = reader.shape(name)
            if shape != tuple(meta.shape):
                raise CompressError(f"tensor {name} is {list(shape)}, wanted {list(meta.shape)}", hint=loading._UNFIT)
            tensor = _reconstruct(reader, name, torch.empty(shape, dtype=meta.dtype, device=device))
            place(model, name, nn.Parameter(tensor, False) if isinstance(meta, nn.Parameter) else tensor)
            filled.add(name)
    model.tie_weights(missing_keys=absent - filled, recompute_mapping=False)
    for name, buffer in list(model.named_buffers()):
        place(model, name, buffer.to(device))
    reader.close()
    model.name_or_path = model.config.name_or_path = str(bundle.folder)
    return _switchable(model, bundle, task)


def _present(model: Any, names: Sequence[str]) -> set[str]:
    """The bundle's names that the model may hold: tensors that only the checkpoint knows are left out."""
    known = set(model.state_dict())
    return {n for n in names if n in known}


def _reconstruct(reader: BundledReader, name: str, out: torch.Tensor) -> torch.Tensor:
    """Write a task's tensor into `out`, piece by piece, and return it."""
    flat, done = out.view(-1), 0
    for piece in reader.chunks(name):
        flat[done : done + len(piece)].copy_(piece)
        done += len(piece)
    return out


def _switchable(model: Any, bundle: Bundle, task: str) -> PreTrainedModel:
    state = {"task": task}

    def set_task(self: Any, name: str) -> Any:
        """Make this the model of another task, in place; returns the model."""
        if name != state["task"]:
            _switch(self, bundle, state["task"], name)
            state["task"] = name
            self.task = name
        return self

    model.set_task = types.MethodType(set_task, model)
    model.task, model.tasks, model.bundle = task, tuple(bundle.tasks), bundle
    return decoding.attach(model.eval())  # type: ignore[no-any-return]


def _switch(model: Any, bundle: Bundle, old: str, new: str) -> None:
    """Overwrite every tensor that the two tasks do not both have from the base."""
    from transformers import GenerationConfig

    before, after = bundle.reader(old), bundle.reader(new)
    _same_shape(bundle, old, new)
    present = dict(model.named_parameters()) | dict(model.named_buffers())
    resized = False
    with torch.no_grad():
        for name in after.names:
            same = name in before and before.how(name) == BASE == after.how(name) and before.dtype(name) == after.dtype(name)
            if name not in present or (same and before.shape(name) == after.shape(name)):
                continue
            tensor, shape = present[name], after.shape(name)
            if tuple(tensor.shape) == shape:
                _reconstruct(after, name, tensor.data)
            else:
                resized = True
                fresh = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                place(model, name, nn.Parameter(_reconstruct(after, name, fresh), False))
    after.close()
    if resized:
        _resize(model, int(bundle.config(new)["vocab_size"]))
    with bundle.companions(new) as folder:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)


def _resize(model: Any, vocab: int) -> None:
    """Tell the modules of another vocabulary, and tie the head again."""
    model.config.get_text_config().vocab_size = vocab
    model.get_input_embeddings().num_embeddings = vocab
    head = model.get_output_embeddings()
    if head is not None:
        head.out_features = vocab
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights(missing_keys=set(model.all_tied_weights_keys), recompute_mapping=False)


def _same_shape(bundle: Bundle, *tasks: str) -> None:
    """Refuse tasks whose models differ in more than their vocabulary."""
    configs = [{k: v for k, v in bundle.config(t).items() if k not in _OWN} for t in tasks]
    for name, config in zip(tasks[1:], configs[1:], strict=True):
        wrong = sorted(k for k in config.keys() | configs[0].keys() if config.get(k) != configs[0].get(k))
        if wrong:
            raise CompressError(
                f"{tasks[0]} and {name} have different config.json ({wrong[0]}), so one model cannot be both",
                hint="load each with compress.load(path, task=…)",
            )


# -- all tasks at once -----------------------------------------------------------------------------------------------------


def load_mixed(bundle: Bundle, device: torch.device, dtype: Any, exact: bool) -> PreTrainedModel:
    """The model of all tasks, in eval mode: `set_tasks`, `set_task`, and `generate(tasks=[…])`."""
    _same_shape(bundle, *bundle.tasks)
    config = load_config(bundle.base_folder)
    with loading._transformers_errors(bundle.base_folder):
        model = loading._empty(config, loading._dtype(dtype, config, device, exact))
    _fill_base(model, bundle, device)
    rows = Rows(tuple(bundle.tasks))
    readers = {t: bundle.reader(t) for t in bundle.tasks}
    tied = dict(model.all_tied_weights_keys) if getattr(config, "tie_word_embeddings", False) else {}
    if any(len(r.shape(n)) > 2 for r in readers.values() for n in r.names if r.how(n) == MASKED):
        raise CompressError(f"{bundle.folder}: stacked experts cannot run mixed batches", hint="load one task: task=NAME")
    for name, module in list(model.named_modules()):
        found = {p: tied.get(f"{name}.{p}", f"{name}.{p}") for p, _ in module.named_parameters(recurse=False)}
        changed = {p: n for p, n in found.items() if any(n in r and r.how(n) != BASE for r in readers.values())}
        if changed:
            place(model, name, _layer(module, found, changed, bundle, readers, rows, device))
    for reader in readers.values():
        reader.close()
    model.name_or_path = model.config.name_or_path = str(bundle.folder)
    return _mixed(model, bundle, rows)


def _fill_base(model: Any, bundle: Bundle, device: torch.device) -> None:
    view = CheckpointView(CheckpointReader(bundle.base_folder), Skeleton(model.config))
    names = set(view.names)
    absent = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    filled = set()
    for name, meta in dict(model.state_dict(keep_vars=True)).items():
        if name in names:
            tensor = view.read(name).to(device, meta.dtype)
            place(model, name, nn.Parameter(tensor, False) if isinstance(meta, nn.Parameter) else tensor)
            filled.add(name)
    model.tie_weights(missing_keys=absent - filled, recompute_mapping=False)
    for name, buffer in list(model.named_buffers()):
        place(model, name, buffer.to(device))


def _layer(
    module: nn.Module, found: Mapping[str, str], changed: Mapping[str, str], bundle: Bundle, readers: Mapping[str, BundledReader],
    rows: Rows, device: torch.device,
) -> nn.Module:  # fmt: skip
    """What stands in the place of a module that differs between tasks."""
    weight = changed.get("weight")
    plain = type(module) in (nn.Linear, nn.Embedding) and weight is not None and weight in bundle.facts["tensors"]
    if not plain or weight is None:
        own = {t: _dense(changed, r, module, device) for t, r in readers.items()}
        return PerTask(module, {t: tensors for t, tensors in own.items() if tensors}, rows)
    shared = moved(bundle.opened(weight), device) if bundle.shared is not None and _has_shared(bundle, weight) else None
    deltas, tails, dense = {}, {}, {}
    for task, reader in readers.items():
        if weight not in reader or reader.how(weight) == BASE:
            continue
        if reader.how(weight) == MASKED:
            if reader.own is not None and f"{weight}.scale" in reader.own:
                delta = reader.delta(weight)
                deltas[task] = kernel.Delta(delta.mask.to(device), delta.scale)
            tail = reader.tail(weight)
            if tail is not None:
                tails[task] = tail.to(device, module.weight.dtype)
        else:
            dense[task] = reader.read(weight).to(device, module.weight.dtype)
    if isinstance(module, nn.Embedding):
        return TaskEmbedding(module, shared, deltas, tails, dense, bundle.are_signs, rows)
    biases = {t: _dense({"bias": found["bias"]}, r, module, device) for t, r in readers.items()} if "bias" in changed else {}
    own_biases = {t: b["bias"] for t, b in biases.items() if b}
    assert isinstance(module, nn.Linear)
    return TaskLinear(module, shared, deltas, tails, dense, own_biases, bundle.are_signs, rows)


def _has_shared(bundle: Bundle, name: str) -> bool:
    return bundle.shared is not None and any(f"{name}.{s}" in bundle.shared for s in ("shared", "shared_packed"))


def _dense(names: Mapping[str, str], reader: BundledReader, module: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """A task's own parameters of a module, dense; empty where it has the base's."""
    out = {}
    for param, name in names.items():
        if name in reader and reader.how(name) != BASE:
            out[param] = reader.read(name).to(device, module.get_parameter(param).dtype)
    return out


def _mixed(model: Any, bundle: Bundle, rows: Rows) -> PreTrainedModel:
    plain = model.generate

    def set_tasks(self: Any, names: Sequence[str | None]) -> Any:
        """The task of each row of the next batches; None is the base. Returns the model."""
        for name in names:
            if name is not None:
                bundle.task_folder(name)
        rows.names = tuple(names)
        return self

    def generate(self: Any, *args: Any, tasks: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """transformers' generate; `tasks` names each row's."""
        if tasks is not None:
            self.set_tasks(tasks)
        return plain(*args, **kwargs)

    model.set_tasks = types.MethodType(set_tasks, model)
    model.set_task = types.MethodType(lambda self, name: self.set_tasks([name]), model)
    model.generate = types.MethodType(generate, model)
    model.tasks, model.bundle, model.task_rows = tuple(bundle.tasks), bundle, rows
    return decoding.attach(model.eval())  # type: ignore[no-any-return]

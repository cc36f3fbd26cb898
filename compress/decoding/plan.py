"""Which models decode natively: a Llama-like model's modules become `compress_kernels.block`'s weights, or a reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat, starmap
from operator import attrgetter, contains, getitem, is_
from typing import Any

import torch
from compress_kernels import block as kernel
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from compress.modules import CompressedLinear, TiedLinear
from compress.tasklayers import PerTask, TaskLinear

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not change with the length of the text
# transformers' own, which all compute the same; another one may be anything
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")

_TABLE = 1 << 17  # positions that are kept


class Unfit(Exception):
    """Why a model cannot decode natively."""


def _check(model: Any) -> None:
    """Raise where the model is none of ours, or asks for something that the kernel has not."""
    config, name = model.config, type(model).__name__
    if name not in CLASSES or not type(model).__module__.startswith("transformers.models."):
        raise Unfit(f"{name} is none of {', '.join(CLASSES)}")
    if model.device.type != "cpu":
        raise Unfit(f"it is on {model.device.type}")
    if config.hidden_act != "silu":
        raise Unfit(f"its activation is {config.hidden_act}")
    window = config.sliding_window if name == "MistralForCausalLM" else None
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if window is not None or kinds:
        raise Unfit(f"its attention is {', '.join(sorted(kinds)) or f'over a window of {window}'}")


def tasks_of(model: Any) -> Any:
    """The tasks that were named for the rows of a bundle's model; None for any other model, or where none were."""
    return getattr(getattr(model, "task_rows", None), "names", None)


def _task(model: Any) -> str | None:
    """The one task that a bundle's model is asked for; None is the base's, and any other model's."""
    names = tasks_of(model)
    if hasattr(model, "task_rows") and names is None:
        raise Unfit("no task was chosen")
    if names and len(set(names)) > 1:
        raise Unfit("the batch is of several tasks")
    return names[0] if names else None


def _linear(name: str, module: nn.Module, dtype: torch.dtype, task: str | None) -> kernel.Linear:
    if type(module) is TaskLinear:
        return _of_task(name, module, dtype, task)
    if type(module) is PerTask and type(module.module) is nn.Linear:
        found = {**dict(module.module.named_parameters()), **module.own.get(task, module.module.weight.device)}
        return kernel.Linear(found["weight"].detach(), _detached(found.get("bias")), dtype)
    if type(module) is nn.Linear:
        return kernel.Linear(module.weight.detach(), _detached(module.bias), dtype)
    if type(module) not in (CompressedLinear, TiedLinear):
        raise Unfit(f"{name} is a {type(module).__name__}")
    lowered = kernel.lower(module.prepared, module.bias, dtype) if module.prepared is not None else "it is offloaded"
    if isinstance(lowered, str):
        raise Unfit(f"{name} is {module.kind}, and {lowered}")
    return lowered


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


def _of_task(name: str, module: TaskLinear, dtype: torch.dtype, task: str | None) -> kernel.Linear:
    """A linear of one task: the base's, or with the task's delta, or the task's own."""
    weight, bias = module.weight.detach(), _detached(module.biases.get(str(task), module.bias))
    if task in module.dense:
        weight = module.dense[task].detach()
    if module.width != len(weight) or task in module.tails:
        raise Unfit(f"{name} has {module.width} outputs, of which tasks have their own")
    if task in module.dense or task not in module.deltas or module.shared is None:
        return kernel.Linear(weight, bias, dtype)
    made = kernel.with_delta(weight, bias, module.shared, module.deltas[task], module.are_signs, dtype)
    if isinstance(made, str):
        raise Unfit(f"{name} is masked_delta, and {made}")
    return made


def _norm(name: str, module: nn.Module, task: str | None) -> tuple[torch.Tensor, float]:
    own: dict[str, torch.Tensor] = {}
    if type(module) is PerTask:
        module, own = module.module, module.own.get(task, next(module.parameters()).device)
    eps = getattr(module, "variance_epsilon", None)
    if eps is None or [n for n, _ in module.named_parameters()] != ["weight"]:
        raise Unfit(f"{name} is a {type(module).__name__}")
    weight: torch.Tensor = own.get("weight", module.weight).detach()  # type: ignore[arg-type, operator]
    return weight, float(eps)


def _acts(hooks: Any) -> bool:
    """Whether hooks are more than those by which transformers keeps hidden states, and which stay once they were asked for."""
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks.values())


class Rope:
    """Cosines and sines (positions, head_dim/2) in fp32, of the model's own frequencies; a table that grows as it is asked for."""

    def __init__(self, module: Any, head_dim: int) -> None:
        kind = getattr(module, "rope_type", None)
        if kind not in ROPES:
            raise Unfit(f"its rotary embedding is {kind!r}")
        self.frequencies: torch.Tensor = module.inv_freq
        self.scaling = float(module.attention_scaling)
        if 2 * self.frequencies.numel() != head_dim:
            raise Unfit(f"its rotary embedding turns {2 * self.frequencies.numel()} of {head_dim} elements")
        self._size = head_dim // 2
        self._grow(512)

    def _turned(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.float()[:, None] * self.frequencies.float()
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def _grow(self, length: int) -> None:
        self.cos, self.sin = self._turned(torch.arange(length))
        self._addresses = self.cos.data_ptr(), self.sin.data_ptr()

    def at(self, positions: Sequence[int]) -> tuple[int, int]:
        """Where cosines and sines (B, head_dim/2) of so many positions lie, until the next call."""
        last = max(positions)
        if len(self.cos) <= last < _TABLE:
            self._grow(min(2 * last, _TABLE))
        if len(positions) == 1 and last < _TABLE:
            offset = 4 * self._size * last
            return self._addresses[0] + offset, self._addresses[1] + offset
        self._rows = self._turned(torch.tensor(positions))
        return self._rows[0].data_ptr(), self._rows[1].data_ptr()


class Plan:
    """A model's native decoder, and what must stay as it is for that to remain the model."""

    def __init__(self, model: Any) -> None:
        """Raises Unfit with the reason."""
        _check(model)
        dtype, trunk = model.dtype, model.model
        self.tasks, task = tasks_of(model), _task(model)
        blocks, epsilons = [], set()
        for i, layer in enumerate(trunk.layers):
            made, eps = self._block(f"model.layers.{i}", layer, dtype, task)
            blocks.append(made)
            epsilons |= eps
        norm, eps_last = _norm("model.norm", trunk.norm, task)
        if epsilons | {eps_last} != {eps_last}:
            raise Unfit("its norms have different epsilons")
        head = _linear("lm_head", model.lm_head, dtype, task)
        attention = trunk.layers[0].self_attn
        d = int(attention.head_dim)
        sizes = blocks[0].q.shape[0] // d, blocks[0].k.shape[0] // d
        shape = kernel.Shape(*sizes, d, eps_last, float(attention.scaling))
        why = kernel.can_run(blocks, norm, head, shape, dtype)
        if why is not None:
            raise Unfit(why)
        self.decoder = kernel.Decoder(blocks, norm, head, shape, dtype)
        self.rope = Rope(trunk.rotary_emb, d)
        self.blocks, self.dtype = len(blocks), dtype
        self._watch(model)

    def _block(self, name: str, layer: Any, dtype: torch.dtype, task: str | None) -> tuple[kernel.Block, set[float]]:
        """A block's weights, and its norms' epsilons."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = {"norm_in": layer.input_layernorm, "norm_mid": layer.post_attention_layernorm}
        if hasattr(attention, "q_norm"):
            norms |= {"norm_q": attention.q_norm, "norm_k": attention.k_norm}
        weights = {key: _norm(f"{name}.{key}", module, task) for key, module in norms.items()}
        parts = {k: getattr(attention, f"{k}_proj") for k in "qkvo"} | {
            k: getattr(mlp, f"{k}_proj") for k in ("gate", "up", "down")
        }
        linears = {key: _linear(f"{name}.{key}_proj", module, dtype, task) for key, module in parts.items()}
        return kernel.Block(**linears, **{k: w for k, (w, _) in weights.items()}), {eps for _, eps in weights.values()}

    def _watch(self, model: nn.Module) -> None:
        """Note every module, weight and list of hooks that the decoder stands for."""
        inside = [m for name, m in model.named_modules() if name]
        self._places: list[tuple[Any, str]] = [(m._modules, name) for m in model.modules() for name in m._modules]
        self._places += [(m._parameters, name) for m in inside for name in m._parameters]
        self._found = [parent[name] for parent, name in self._places]
        self._linears = [m for m in inside if isinstance(m, CompressedLinear)]
        self._prepared = [m.prepared for m in self._linears]
        self._tensors = [t for m in inside for t in m._parameters.values() if t is not None] + [self.rope.frequencies]
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._hooks = [h for m in inside for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._instances = [vars(m) for m in inside]
        self._config = model.config

    def holds(self, model: Any) -> bool:
        """Whether nothing that the decoder stands for was replaced, moved or prepared again since, nor another task chosen."""
        return (
            tasks_of(model) == self.tasks
            and all(map(is_, starmap(getitem, self._places), self._found))
            and all(map(is_, map(attrgetter("prepared"), self._linears), self._prepared))
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses
        )

    def interrupted(self) -> str | None:
        """Why the model's own forward must run although the decoder could."""
        if any(map(contains, self._instances, repeat("forward"))) or (any(self._hooks) and any(map(_acts, self._hooks))):
            return "modules have hooks"
        if _has_any_global_hook():
            return "modules have hooks"
        if self._config.output_hidden_states or self._config.output_attentions:
            return "its config asks for hidden states or attentions"
        if self._config._attn_implementation not in ATTENTIONS:
            return f"its attention is {self._config._attn_implementation}"
        if torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors):
            return "weights require gradients"
        return None

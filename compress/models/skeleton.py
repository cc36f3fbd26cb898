"""A model without its weights: names, shapes, blocks that run with borrowed parameters, and the identity walk.

The model is built by transformers on `meta`, so no architecture is written twice. `embed` replaces every block by a recorder
that returns its input and calls the model's own forward once per batch shape: that yields block 0's input and, per block, the
masks, rotary embeddings and other keyword arguments that the model would have passed. `run` then executes one block (or one
module of it) with parameters handed in, through `torch.func.functional_call`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint.reader import read_json
from compress.errors import CompressError
from compress.models import auto, families
from compress.models.families import FAMILIES, Family
from compress.models.view import CheckpointView
from compress.types import Scaling

logger = logging.getLogger(__name__)
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Recorder(nn.Module):
    """Stands in for a block: keeps the arguments, returns the input, answers for the block's attributes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its parameters must not be visited
        self.call: Call | None = None
        self.tuple_output: bool | None = None
        self.value: torch.Tensor | None = None  # returned instead of the input

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.call = (args, kwargs)
        if self.tuple_output is None:
            self.tuple_output = isinstance(_meta_call(self._block, hidden, args, kwargs), tuple)
        out = hidden if self.value is None else self.value
        return (out,) if self.tuple_output else out


def _to(value: Any, device: str | torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value


def _meta_call(block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The block's output on `meta`: costs nothing and shows its structure. None if it cannot run there."""
    tensors = {name: t.to("meta") for name, t in (*block.named_parameters(), *block.named_buffers())}
    try:
        return torch.func.functional_call(block, tensors, (hidden.to("meta"), *_to(args, "meta")), _to(kwargs, "meta"))
    except (RuntimeError, NotImplementedError) as error:
        logger.debug("block does not run on meta: %s", error)
        return None


def load_config(folder: Path, trust_remote_code: bool = False, compressed: bool = False) -> Any:
    """The transformers config of a model folder; families that we cannot stream are refused with the reason.

    `compressed` accepts an artifact and returns the dense model's config.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if raw.get("quantization_config") and not compressed:
        raise CompressError(
            f"{folder}: already compressed ({raw['quantization_config'].get('quant_method', 'unknown method')})",
            hint="start from the dense checkpoint",
        )
    if raw.get("auto_map") and not trust_remote_code:
        logger.warning("%s brings its own code, which is not run (--trust-remote-code allows it)", folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # strict configs raise types of their own
        if kind in CONFIG_MAPPING:
            reason = str(error).strip().split("\n")[0]
            raise CompressError(f"{folder}/config.json: {reason}", hint="correct the field, or download the file again") from error
        raise CompressError(
            f"{folder}: unknown model family {kind!r}",
            hint=f"in the table: {', '.join(FAMILIES)}; other decoders that transformers knows work too; is it spelled right?",
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if getattr(config, "is_encoder_decoder", False):
        raise CompressError(f"{folder}: {kind!r} is an encoder-decoder model", hint="compress takes decoder-only models")
    return config


class Skeleton:
    """A causal language model on `meta`; of a vision-language model, the blocks are the text decoder's."""

    def __init__(self, config: Any, trust_remote_code: bool = False) -> None:
        from accelerate import init_empty_weights

        self.config = config
        try:
            with init_empty_weights(include_buffers=False):
                self.model = auto.auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, ImportError) as error:
            raise CompressError(
                f"model family {config.model_type!r} has no causal language model in transformers",
                hint=f"in the table: {', '.join(FAMILIES)}; other decoder-only families work too",
            ) from error
        self.model.eval().requires_grad_(False)
        embedding = self.model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None  # `embed` hands in only the rows of a batch; a forward pass does not use it
        self.trunk = auto.trunk(self.model)
        self.trunk_path = next((n for n, m in self.model.named_modules() if m is self.trunk), "")
        self.family: Family | None = families.find(config, self.trunk_path)
        self.path = self.family.blocks if self.family else self._find_blocks()
        blocks = self.model.get_submodule(self.path)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks: list[nn.Module] = list(blocks)
        self._calls: list[dict[int, Call]] = [{} for _ in self.blocks]
        self._groups: dict[tuple[str, ...], tuple[tuple[str, ...], ...]] = {}
        if self.family is None:
            dense = [n for n, p in self.blocks[0].named_parameters() if p.dim() > 2]
            logger.warning(
                "family %r is not in the table: blocks are %s; groups are read off a dry forward pass; no scale mapping is "
                "known, so "
                "AWQ can only search clipping%s", config.model_type, self.path,
                f"; {', '.join(dense)} are not linears and stay dense" if dense else "",
            )  # fmt: skip

    def _find_blocks(self) -> str:
        best, size = "", 0
        for name, module in self.trunk.named_modules(prefix=self.trunk_path):
            if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1:
                count = sum(p.numel() for p in module.parameters())
                if count > size and any(isinstance(m, nn.Linear) for m in module.modules()):
                    best, size = name, count
        if not best:
            raise CompressError(
                f"model family {self.config.model_type!r}: no list of equal blocks with linears was found",
                hint=f"supported: {', '.join(FAMILIES)} and decoders built alike",
            )
        return best

    # -- names and shapes ---------------------------------------------------------------------------------------------

    def prefix(self, index: int) -> str:
        """Name of a block, with a trailing dot."""
        return f"{self.path}.{index}."

    def linears(self, index: int) -> dict[str, tuple[int, int]]:
        """Linears of a block, relative names -> (O, I)."""
        out = {}
        for name, module in self.blocks[index].named_modules():
            if isinstance(module, nn.Linear):
                out[name] = (module.out_features, module.in_features)
            elif self.transposed(module):
                out[name] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
        return out

    @staticmethod
    def transposed(module: nn.Module) -> bool:
        """GPT-2's Conv1D: a linear that stores its weight (I, O)."""
        return type(module).__name__ == "Conv1D"

    def all_linears(self) -> list[str]:
        """Full names of every nn.Linear of the model, blocks or not."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    @functools.cached_property
    def conv1d_weights(self) -> set[str]:
        """Full parameter names of transposed weights."""
        return {f"{n}.weight" for n, m in self.model.named_modules() if self.transposed(m)}

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Full names -> shapes of everything a checkpoint must hold, as the model stores it; tied copies once."""
        tied = set(self.model.all_tied_weights_keys) if getattr(self.config, "tie_word_embeddings", False) else set()
        return {n: tuple(t.shape) for n, t in self.model.state_dict().items() if n not in tied}

    def groups(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Linears that read the same input, in the order in which the block uses them."""
        names = tuple(self.linears(index))
        if self.family is not None:
            known = {n for group in self.family.groups for n in group}
            return (*self.family.groups, *((n,) for n in names if n not in known))
        return self._groups.get(names) or tuple((n,) for n in names)

    def scalings(self) -> tuple[Scaling, ...]:
        return self.family.scalings(self.config.get_text_config()) if self.family else ()

    def no_clip(self, index: int) -> frozenset[str]:
        if self.family is not None:
            return self.family.no_clip
        unsafe = ("q_", "k_", "query", "key", "Wqkv", "qkv")  # llm-awq auto_clip.py, and fused projections
        return frozenset(n for n in self.linears(index) if any(u in n.rsplit(".", 1)[-1] for u in unsafe))

    # -- running ------------------------------------------------------------------------------------------------------

    def embed(
        self, view: CheckpointView, tokens: torch.Tensor, batch_size: int, device: str, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """Yield block 0's inputs, one (B, T, D) tensor per batch of tokens (N, T); records every block's arguments."""
        base, embedding = self.model.base_model, self.model.get_input_embeddings()
        tensors = self._base_tensors(view, device, dtype)
        embedding_name = next(n for n, m in self.model.named_modules() if m is embedding) + ".weight"
        with self._recorders() as recorders:
            for batch in tokens.split(batch_size):
                rows, compact = batch.unique(return_inverse=True)
                weight = view.read_rows(embedding_name, rows).to(device, dtype)
                x = torch.func.functional_call(embedding, {"weight": weight}, (compact.to(device),))
                catcher = _FirstInput(recorders[0])
                torch.func.functional_call(base, tensors, (), {"inputs_embeds": x, "use_cache": False}, strict=False)
                hidden = catcher.value()
                for calls, recorder in zip(self._calls, recorders, strict=True):
                    assert recorder.call is not None, "the model skipped a block"
                    calls.setdefault(len(batch), recorder.call)
                yield hidden
        if self.family is None:
            self._infer_groups(hidden)

    def finish(self, view: CheckpointView, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the head reads (B, T, D): the last block's output `hidden` through whatever the model puts after its blocks."""
        with self._recorders() as recorders:
            recorders[-1].value = hidden
            tensors = self._base_tensors(view, str(hidden.device), dtype)
            out = torch.func.functional_call(
                self.model.base_model, tensors, (), {"inputs_embeds": torch.zeros_like(hidden), "use_cache": False}, strict=False
            )
        result: torch.Tensor = out[0]
        return result

    @contextmanager
    def _recorders(self) -> Iterator[list[_Recorder]]:
        """Every block replaced by one that returns its input."""
        blocks = self.model.get_submodule(self.path)
        recorders = [_Recorder(b) for b in self.blocks]
        for i, recorder in enumerate(recorders):
            blocks[i] = recorder  # type: ignore[index]
        try:
            yield recorders
        finally:
            for i, block in enumerate(self.blocks):
                blocks[i] = block  # type: ignore[index]

    def _base_tensors(self, view: CheckpointView, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the trunk but for embedding and blocks, by their names in the base model."""
        base = self.model.base_model
        own = {id(p) for m in (self.model.get_input_embeddings(), *self.blocks) for p in m.parameters()}
        wanted = {id(t) for t in (*self.trunk.parameters(), *self.trunk.buffers())} - own
        prefix = next((n for n, m in self.model.named_modules() if m is base), "")
        prefix = f"{prefix}." if prefix else ""
        tensors = {n: view.read(prefix + n).to(device, dtype) for n, p in base.named_parameters() if id(p) in wanted}
        stored = set(view.names)
        for n, b in base.named_buffers():
            if id(b) in wanted:
                tensors[n] = (view.read(prefix + n) if prefix + n in stored else b).to(device)
        return tensors

    def calls(self, index: int) -> list[Call]:
        """The arguments that the model passes to a block beside the hidden states, per batch size."""
        return list(self._calls[index].values())

    def _infer_groups(self, hidden: torch.Tensor) -> None:
        for index, block in enumerate(self.blocks):
            names = tuple(self.linears(index))
            if names in self._groups:
                continue
            readers: dict[int, list[str]] = {}
            keep: list[torch.Tensor] = []  # ids are unique only while the tensors live

            def note(name: str, readers: dict[int, list[str]] = readers, keep: list[torch.Tensor] = keep) -> Any:
                def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                    keep.append(inputs[0])
                    readers.setdefault(id(inputs[0]), []).append(name)

                return hook

            handles = [block.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
            _meta_call(block, hidden, *self._calls[index][hidden.shape[0]])
            for handle in handles:
                handle.remove()
            found = [tuple(group) for group in readers.values()]
            seen = {n for group in found for n in group}
            self._groups[names] = (*found, *((n,) for n in names if n not in seen))

    def run(self, index: int, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Output (B, T, D) of block `index` on `hidden` with the given parameters (relative names, as the model stores them)."""
        args, kwargs = self._calls[index][hidden.shape[0]]
        out = torch.func.functional_call(self.blocks[index], dict(tensors), (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out

    def run_module(
        self,
        index: int,
        module: str,
        tensors: Mapping[str, torch.Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        """Output of one module of a block; `tensors` are the block's, by relative name."""
        inner = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
        target = self.blocks[index].get_submodule(module)
        out = torch.func.functional_call(target, inner, tuple(args), dict(kwargs))
        return out[0] if isinstance(out, tuple) else out


class _FirstInput:
    """Catches the first argument of a module's next call."""

    def __init__(self, module: nn.Module) -> None:
        self._seen: list[torch.Tensor] = []
        self._handle = module.register_forward_pre_hook(lambda _m, args: self._seen.append(args[0]))

    def value(self) -> torch.Tensor:
        self._handle.remove()
        return self._seen[0]

"""A small compressed model through its own modules on the GPU at hand (or in the interpreter), beside the decoding path in torch.

What only a device shows: q, k, v and gate, up in one launch each, with the cache, captured in a CUDA graph and replayed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def model(device: torch.device) -> list[dict[str, Any]]:
    """Rows as `gpu_checks.checks` gives, or one that says what is not installed, or what went wrong."""
    try:
        return list(_rows(device))
    except ImportError as error:
        return [{"skipped": "a model through its modules", "why": f"{error.name} is not installed"}]
    except Exception as error:  # the kernels are right by themselves, so they are timed all the same
        return [{**_row("a model through its modules", float("inf"), 0.0), "raised": f"{type(error).__name__}: {error}"}]


def _rows(device: torch.device) -> Iterator[dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    import compress

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=2, attention_bias=True, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "dense", Path(folder) / "compressed"
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
        compress.quantize(source, "rtn", out, bits=4, group_size=64, device="cpu")
        yield from _compared(compress, out, device)


def _compared(compress: Any, out: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    ids = torch.arange(1, 6, device=device)[None]
    before, logits = os.environ.get("COMPRESS_BACKEND"), {}
    try:
        for path in ("tiled", "triton"):
            os.environ["COMPRESS_BACKEND"] = path
            network = compress.load(out, device=str(device), dtype="bfloat16")
            with torch.no_grad():
                logits[path] = network(ids).logits
    finally:
        os.environ.pop("COMPRESS_BACKEND")
        os.environ |= {} if before is None else {"COMPRESS_BACKEND": before}
    want, got = (logits[path].double() for path in ("tiled", "triton"))
    groups = {id(m.group): m.group for m in network.modules() if getattr(m, "group", None) is not None}
    fused = [g._whole is not None and not g.interrupted() for g in groups.values()]
    yield _row("a model's logits", float((got - want).norm() / want.norm()), 2e-2)  # bf16 at every step, in another order
    yield _row("q, k, v and gate, up are one launch each", float(len(fused) - sum(fused)) if fused else float("inf"), 0.0)
    if device.type != "cuda":
        return
    yield _row("a model in a CUDA graph", _captured(network, ids, logits["triton"]), 2e-2)
    held = [b for m in network.modules() if hasattr(m, "held") for b in m.held()]
    yield _row("the artifact's tensors are not on the GPU", float(sum(b.is_cuda for b in held)), 0.0)
    state = {name: t.cpu() for name, t in network.state_dict().items()}
    with torch.no_grad():
        there = network.to("cpu")(ids.cpu()).logits.to(device)
        back = network.to(device)(ids).logits
    yield _row("a model moved to the CPU", float((there.double() - want).norm() / want.norm()), 5e-2)  # 8-bit activations there
    yield _row("and back", float((back.double() - got).norm() / got.norm()), 2e-2)
    yield _row("its tensors", float(sum(not torch.equal(t.cpu(), state[n]) for n, t in network.state_dict().items())), 0.0)


def _row(what: str, error: float, most: float) -> dict[str, Any]:
    return {"check": what, "dtype": "bfloat16", "error": error, "most": most, "good": error <= most}


@torch.no_grad()
def _captured(network: Any, ids: torch.Tensor, want: torch.Tensor) -> float:
    """How far a replay's logits are from the eager ones; the ids are written after the capture."""
    static, side = torch.zeros_like(ids), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        network(static, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = network(static, use_cache=False).logits
    static.copy_(ids)
    graph.replay()
    return float((out.double() - want.double()).norm() / want.double().norm())

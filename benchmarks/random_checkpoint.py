"""Write a Llama checkpoint with random weights, shard by shard, to measure memory and speed at a real model's size.

The llama3-8b shape is Llama-3-8B's, tinyllama-1.1b TinyLlama's; --blocks makes it shallower. Only one shard is in memory at a
time. The tokenizer is the one of examples/stories15M: its ids stay below 32000, which every shape here has room for.

    python benchmarks/random_checkpoint.py --shape llama3-8b --blocks 32 --out out/random-8b
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "examples" / "stories15M"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
STD = 0.02
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_hidden_layers": 22,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_hidden_layers": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 512,
    },
}


def config_for(shape: dict[str, Any], blocks: int, dtype: str) -> dict[str, Any]:
    """Hugging Face config of the checkpoint."""
    return {
        **shape,
        "num_hidden_layers": blocks,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name older versions of transformers read
        "hidden_act": "silu",
        "initializer_range": STD,
        "mlp_bias": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the order in which the model uses them."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def plan(config: dict[str, Any], element_size: int, limit: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Split the tensors into shards of at most limit bytes (a larger tensor gets a shard of its own)."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = []
    room = 0
    for name, shape in tensor_shapes(config):
        size = math.prod(shape) * element_size
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append((name, shape))
        room -= size
    return shards


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """N(0, STD) drawn in the target dtype for a matrix; ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0.0, STD, generator=generator)


def write(config: dict[str, Any], dtype: torch.dtype, limit: int, out: Path, seed: int) -> int:
    """Write shards, index, config and tokenizer; return the number of bytes of weights."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shards = plan(config, dtype.itemsize, limit)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {key: random_tensor(shape, dtype, generator) for key, shape in shard}
        save_file(tensors, out / name, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map.update(dict.fromkeys(tensors, name))
        del tensors
        print(f"{name}: {len(shard)} tensors", flush=True)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for file in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / file, out / file)
    return total


def main() -> None:
    """Parse the arguments and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--blocks", type=int, help="number of decoder blocks (default: the shape's own)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--max-shard-gb", type=float, default=2.0, help="largest shard, in GB")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    blocks = shape["num_hidden_layers"] if arguments.blocks is None else arguments.blocks
    if blocks < 1 or arguments.max_shard_gb <= 0:
        parser.error("--blocks and --max-shard-gb must be positive")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        sys.exit(f"error: {arguments.out} exists and is not an empty folder")
    dtype = getattr(torch, arguments.dtype)
    config = config_for(shape, blocks, arguments.dtype)
    size = sum(math.prod(shape) for _, shape in tensor_shapes(config)) * dtype.itemsize
    parent = next(path for path in arguments.out.absolute().parents if path.exists())
    if (free := shutil.disk_usage(parent).free) < size + 2**28:
        sys.exit(f"error: the checkpoint takes {size / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free")
    start = time.perf_counter()
    total = write(config, dtype, int(arguments.max_shard_gb * 1e9), arguments.out, arguments.seed)
    seconds = time.perf_counter() - start
    print(f"wrote {total / 1e9:.2f} GB of weights to {arguments.out} in {seconds:.0f} s")


if __name__ == "__main__":
    main()

"""Do factors that k and v (or q, k and v) share beat factors of their own at equal parameters? Prints a table; docs/log.md has it.

    python benchmarks/joint_kv.py --model out/SmolLM2-135M-Instruct [--blocks 0 7 15 24]

Errors are output errors on the calibration windows, each linear's relative to its own output. Linears of their own share one
budget, spent as `lost` spends it; the joint matrix is one linear, with one A and one set of columns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from compress import calibration
from compress.methods import _budget, _lowrank
from compress.methods.lost import GRID

ROOT = Path(__file__).resolve().parents[1]
NONE = torch.empty(0, dtype=torch.int64)


def curve(W: torch.Tensor, C: _lowrank.Moment) -> _budget.Options:
    """What a weight (O, I) may become, in its own scale."""
    problem, (O, I) = _lowrank.Problem(W, C), (W.shape[0], W.shape[1])
    columns = sorted({int(share * I) for share in GRID})
    U = problem.basis(NONE, min(O, I) // 3)
    rows = [torch.stack([problem.tail(problem.choose(rule, U, s).sort().values) for rule in ("diag", "weight")]) for s in columns]
    return _budget.options(torch.stack([r.amin(0) for r in rows]), columns, (O, I), problem.total, 8)


def best(linears: list[_budget.Options], budget: float) -> float:
    """The least error of all together."""
    picked = _budget.allocate(linears, int(budget))
    assert picked is not None
    return sum(o.error[k] for o, k in zip(linears, picked, strict=True))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="joint factors of q, k and v")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 7, 15, 24])
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    vocab = model.config.vocab_size
    text = calibration.load(None, calibration.load_tokenizer(args.model, False), nsamples=16, seqlen=512, seed=None, vocab=vocab)
    seen: dict[int, torch.Tensor] = {}

    def hook(index: int):
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            seen[index] = seen.get(index, 0) + (x.T @ x).double()

        return add

    for index in args.blocks:
        model.model.layers[index].self_attn.k_proj.register_forward_pre_hook(hook(index))
    model.model.layers = model.model.layers[: max(args.blocks) + 1]
    for window in text.tokens.split(2):
        model(window, use_cache=False)
    print("| block | kept | k, v | joint | q, k, v | q, joint kv | joint qkv |")
    print("| --- |" + " --- |" * 6)
    for index in args.blocks:
        C = _lowrank.moment(seen[index], 0.01)
        weights = [getattr(model.model.layers[index].self_attn, f"{n}_proj").weight.double() for n in "qkv"]
        q, k, v = (W / _lowrank.Problem(W, C).total ** 0.5 for W in weights)
        Q, K, V, KV, QKV = (curve(W, C) for W in (q, k, v, torch.cat([k, v]), torch.cat([q, k, v])))
        for keep in (0.9, 0.8, 0.7, 0.6):
            two, three = keep * 2 * k.numel(), keep * (q.numel() + 2 * k.numel())
            row = best([K, V], two), best([KV], two), best([Q, K, V], three), best([Q, KV], three), best([QKV], three)
            print(f"| {index} | {keep:.0%} | " + " | ".join(f"{e:.5f}" for e in row) + " |", flush=True)


if __name__ == "__main__":
    main()

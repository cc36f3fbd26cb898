"""Text from a model, compressed or not, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint import bundled, source
from compress.errors import CompressError


def stream(
    model: str | Path, prompt: str, *, max_new_tokens: int = 100, temperature: float = 0.0, seed: int = 0, chat: bool = False,
    device: str = "auto", task: str | None = None, base: str | Path | None = None,
) -> Iterator[str]:  # fmt: skip
    """Yield the prompt, then its continuation as it is generated; greedy at temperature 0. `task` and `base` are of a bundle."""
    _check(max_new_tokens, temperature)
    from threading import Thread

    import torch
    from transformers import TextIteratorStreamer

    from compress.calibration import load_tokenizer
    from compress.decoding import loop
    from compress.loading import load

    folder = source.resolve(model)
    if bundled.is_bundle(folder) and task is None:
        raise CompressError(f"{folder}: a bundle", hint="--task NAME", usage=True)
    network: Any = load(folder, device=device, task=task, base=base)
    if task is None:
        tokenizer = load_tokenizer(folder)
    else:
        with network.bundle.companions(task) as own:
            tokenizer = load_tokenizer(own)
    inputs = _encode(tokenizer, prompt, chat, folder)
    start = "" if chat else prompt
    inputs = {k: v.to(network.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    if loop.usable(network) is None:
        yield start
        yield from _native(network, tokenizer, inputs["input_ids"], max_new_tokens, temperature, seed)
        return
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = _sampling(temperature)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed)
                network.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens, **sampling)
        except BaseException as error:  # handed to the caller below
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    for piece in streamer:
        yield start + piece  # the prompt only now: what the first step logs comes before it, not behind it in one line
        start = ""
    thread.join()
    if failure:
        raise failure[0]


def _native(network: Any, tokenizer: Any, ids: Any, max_new_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """The continuation's pieces, by our own loop."""
    import torch
    from transformers import TextStreamer

    from compress.decoding import loop

    pieces: list[str] = []

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    streamer = Pieces(tokenizer, skip_special_tokens=True)
    for token in loop.tokens(network, ids, max_new_tokens, temperature=temperature, seed=seed):
        streamer.put(torch.tensor([token]))
        yield pieces.pop()
    streamer.end()
    yield pieces.pop()


def _check(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1 or temperature < 0:
        raise CompressError("--max-new-tokens must be at least 1, --temperature at least 0", hint="leave them out", usage=True)


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def _encode(tokenizer: Any, prompt: str, chat: bool, folder: Path) -> Any:
    """The prompt's tokens, in the chat template or behind the token that models are trained to begin with."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise CompressError(f"{folder}: its tokenizer has no chat template", hint="leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    bos = tokenizer.bos_token_id  # fast tokenizers without a template leave it out
    if bos is not None and (inputs["input_ids"].numel() == 0 or int(inputs["input_ids"][0, 0]) != bos):
        inputs = tokenizer((tokenizer.bos_token or "") + prompt, return_tensors="pt", add_special_tokens=False)
    return inputs


def batch(
    model: str | Path | Any, prompts: Sequence[str], tasks: Sequence[str], *, base: str | Path | None = None,
    max_new_tokens: int = 100, temperature: float = 0.0, seed: int = 0, chat: bool = False, device: str = "auto",
) -> list[str]:  # fmt: skip
    """Continue prompts of different tasks of a bundle in one batch; returns prompt and continuation of each.

    `tasks` names each prompt's task, or one for all; `model` is a bundle's folder, or `compress.load(folder)`. Each row has its
    task's tokenizer, chat template and end of text.
    """
    import torch

    from compress.calibration import load_tokenizer
    from compress.loading import load

    _check(max_new_tokens, temperature)
    if isinstance(model, str | Path) and not bundled.is_bundle(source.resolve(model)):
        raise CompressError(f"{model}: not a bundle, so a batch of prompts has no tasks", hint="one --prompt", usage=True)
    names = list(tasks) * len(prompts) if len(tasks) == 1 else list(tasks)
    if len(names) != len(prompts) or not prompts:
        raise CompressError(f"{len(prompts)} prompts, {len(names)} tasks", hint="one --task for each --prompt", usage=True)
    network: Any = load(model, device=device, base=base) if isinstance(model, str | Path) else model
    network.set_tasks(names)
    tokenizers = {}
    for name in dict.fromkeys(names):
        with network.bundle.companions(name) as folder:
            tokenizers[name] = load_tokenizer(folder)
    encoded = [_encode(tokenizers[n], p, chat, network.bundle.folder)["input_ids"][0] for n, p in zip(names, prompts, strict=True)]
    width = max(len(ids) for ids in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for i, row in enumerate(encoded):
        ids[i, width - len(row) :], attention[i, width - len(row) :] = row, 1
    ends = [_ends(network.bundle, n, tokenizers[n]) for n in names]
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        out = network.generate(
            input_ids=ids.to(network.device), attention_mask=attention.to(network.device), max_new_tokens=max_new_tokens,
            eos_token_id=None, pad_token_id=0, stopping_criteria=[_RowEnds(ends, width)], **_sampling(temperature),
        )  # fmt: skip
    texts: list[str] = []
    for name, prompt, row, end in zip(names, prompts, out[:, width:].tolist(), ends, strict=True):
        stop = next((i for i, token in enumerate(row) if token in end), len(row))
        head = encoded[len(texts)].tolist()  # decoded together: a first token alone may lose its space
        before, whole = (tokenizers[name].decode(t, skip_special_tokens=True) for t in (head, head + row[:stop]))
        texts.append(("" if chat else prompt) + whole.removeprefix(before))
    return texts


def _ends(bundle: Any, task: str, tokenizer: Any) -> set[int]:
    """Tokens that end a task's text: its generation config's, else its tokenizer's."""
    from compress.checkpoint.reader import read_json

    with bundle.companions(task) as folder:
        path = folder / "generation_config.json"
        found = read_json(path).get("eos_token_id") if path.is_file() else None
    found = tokenizer.eos_token_id if found is None else found
    return set(found if isinstance(found, list) else [found]) - {None}


class _RowEnds:
    """A stopping criterion of transformers: stops each row at its own task's end."""

    def __init__(self, ends: list[set[int]], width: int) -> None:
        self.ends, self.width = ends, width

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        done = [any(t in end for t in row) for row, end in zip(input_ids[:, self.width :].tolist(), self.ends, strict=True)]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

"""Text from a model, compressed or not, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.checkpoint import source
from compress.errors import CompressError


def stream(
    model: str | Path, prompt: str, *, max_new_tokens: int = 100, temperature: float = 0.0, seed: int = 0, chat: bool = False,
    device: str = "auto",
) -> Iterator[str]:  # fmt: skip
    """Yield the prompt, then its continuation as it is generated; greedy at temperature 0."""
    if max_new_tokens < 1 or temperature < 0:
        raise CompressError("--max-new-tokens must be at least 1, --temperature at least 0", hint="leave them out", usage=True)
    from threading import Thread

    import torch
    from transformers import TextIteratorStreamer

    from compress.calibration import load_tokenizer
    from compress.loading import load

    folder = source.resolve(model)
    tokenizer = load_tokenizer(folder)
    network = load(folder, device=device)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise CompressError(f"{folder}: its tokenizer has no chat template", hint="leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
        bos = tokenizer.bos_token_id  # models are trained with it; fast tokenizers without a template leave it out
        if bos is not None and (inputs["input_ids"].numel() == 0 or int(inputs["input_ids"][0, 0]) != bos):
            inputs = tokenizer((tokenizer.bos_token or "") + prompt, return_tensors="pt", add_special_tokens=False)
        yield prompt
    inputs = {k: v.to(network.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
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
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]

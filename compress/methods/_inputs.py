"""Linears that read the same input: what is collected once for all of them, and the order in which they are compressed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compress.types import Block, Collect, Stat


def readers(block: Block) -> Iterator[list[str]]:
    """The linears to compress that read one input, input by input in the order of use."""
    for group in block.groups:
        names = [n for n in group if n in block.weights]
        if names:
            yield names


def stages(block: Block, config: Any) -> tuple[tuple[str, ...], ...]:
    """One stage per input; one stage of all linears without `config.sequential`."""
    return tuple(map(tuple, readers(block))) if config.sequential else (tuple(block.weights),)


def per_input(block: Block, what: Stat) -> Collect:
    """One statistic per input."""
    return Collect({group[0]: what for group in block.groups if any(n in block.weights for n in group)})

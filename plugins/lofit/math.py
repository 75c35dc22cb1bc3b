"""Which heads there are to choose from, how many, and which are best. Plain numbers; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random

from regraft.core.errors import UsageError
from regraft.core.head_file import Head


def head_count(heads: int | float, total: int, available: int) -> int:
    """How many heads `heads` of a recipe means: a number, or a fraction of the model's `total`; at least one.

    Raises:
        UsageError: there are fewer to choose from.
    """
    count = heads if isinstance(heads, int) else max(1, round(heads * total))
    if count > available:
        raise UsageError(
            "there are fewer heads to choose from",
            where="heads",
            expected=f"at most {available}",
            found=count if isinstance(heads, int) else f"{heads:g} of {total}, which is {count}",
            remedy="choose fewer heads, or from more layers",
        )
    return count


def best(scores: Mapping[Head, float], count: int) -> list[Head]:
    """The heads with the highest scores, best first; equal scores in the order of layer and head."""
    return sorted(scores, key=lambda head: (-scores[head], head))[:count]


def drawn(layers: Iterable[int], units: int, count: int, seed: int) -> list[Head]:
    """Heads drawn at random, in the order of layer and head."""
    every = [(layer, unit) for layer in layers for unit in range(units)]
    return sorted(Random(seed).sample(every, count))


def by_layer(heads: Sequence[Head]) -> dict[int, tuple[int, ...]]:
    """Chosen heads of each layer that has any, in order."""
    layers: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        layers.setdefault(layer, []).append(head)
    return {layer: tuple(chosen) for layer, chosen in layers.items()}

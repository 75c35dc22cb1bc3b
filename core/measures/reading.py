"""Reading a long text piece by piece: memory for a piece's attention scores, not for those of the whole text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from regraft.core.errors import Unsupported

if TYPE_CHECKING:
    import torch

SCORES = 1 << 26
"""Attention scores of a layer that may be held at once: heads × tokens of a piece × tokens of the text."""

_LEAST = 16


def read(
    model: Any, ids: Sequence[int], *, scores: int = SCORES, watch: Callable[[int, int], None] | None = None
) -> tuple[torch.Tensor, Any]:
    """Run a model over a text, without gradients.

    Args:
        model: a causal language model of transformers, in eval mode.
        ids: [T] token ids of one text.
        scores: see `SCORES`; a piece has at least 16 tokens, or all there are.
        watch: told before each piece from which token to which it goes.

    Returns:
        The logits [vocabulary] behind the last token, and the key-value cache.

    Raises:
        Unsupported: the model has no key-value cache.
    """
    import torch

    device = next(model.parameters()).device
    row = torch.tensor([list(ids)], device=device)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache, logits = None, torch.empty(0)
    with torch.no_grad():
        for start, stop in _pieces(len(ids), _size(model, len(ids), scores)):
            if watch is not None:
                watch(start, stop)
            outputs = model(input_ids=row[:, start:stop], past_key_values=cache, use_cache=True, **last)
            cache, logits = outputs.past_key_values, outputs.logits[0, -1]
            if cache is None:
                raise Unsupported("the model keeps no keys and values", where="config.json: model_type",
                                  found=model.config.model_type, remedy="use a decoder of transformers")  # fmt: skip
    return logits, cache


def _size(model: Any, length: int, scores: int) -> int:
    heads: int = model.config.get_text_config().num_attention_heads
    return max(_LEAST, scores // (heads * length))


def _pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Pieces of nearly equal length: never one of a single token, which classes treat as a decoding step."""
    count = -(-length // size)
    edges = [length * number // count for number in range(count + 1)]
    yield from pairwise(edges)

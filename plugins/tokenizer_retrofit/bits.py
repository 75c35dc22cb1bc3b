"""Bits per byte of given texts: the one figure that compares models whose tokenizers differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from regraft.core.data.batches import collate
from regraft.core.data.examples import IGNORED, Example, ints
from regraft.core.data.rows import Place
from regraft.core.training.model import memory
from regraft.core.training.modes import without_dropout

if TYPE_CHECKING:
    from regraft.core.training.head import Head

PASSAGE_BYTES = 700
"""Of a passage; texts are cut by bytes, so the passages are the same for every tokenizer."""


def passages(texts: Sequence[str], *, nbytes: int = PASSAGE_BYTES) -> list[str]:
    """The texts cut into passages of at most so many UTF-8 bytes, between characters."""
    return [passage for text in texts for passage in _cut(text, nbytes)]


def bits_per_byte(head: Head, tokenizer: Any, texts: Sequence[str], device: str) -> float:
    """-Σ log2 p over every token of every text, divided by the texts' bytes.

    Each text stands alone behind the token that begins or ends texts, so that its first token counts too.

    Args:
        head: of the model.
        tokenizer: its own.
        texts: short ones; see `passages`.
        device: of the model.
    """
    start = start_of(tokenizer)
    nats, size = 0.0, 0
    with torch.no_grad(), without_dropout(head.model), memory("measuring bits per byte"):
        for number, text in enumerate(texts):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [*([] if start is None else [start]), *own]
            if len(ids) < 2:
                continue
            example = Example(ints(ids), ints([IGNORED, *ids[1:]]), Place("text", number + 1))
            nats += head.label_losses(collate([example], (0,), device)).double().item()
            size += len(text.encode())
    return nats / math.log(2) / max(1, size)


def start_of(tokenizer: Any) -> int | None:
    """The token that texts stand behind: that which begins them, or else ends them; None without either."""
    found: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return found


def _cut(text: str, nbytes: int) -> Iterator[str]:
    data = text.encode()
    start = 0
    while start < len(data):
        piece = data[start : start + nbytes].decode(errors="ignore")
        yield piece
        start += len(piece.encode())

"""Bits per byte of given texts: the one figure that compares models whose tokenizers differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from regraft.core.data.batches import collate
from regraft.core.data.examples import IGNORED, Example, ints
from regraft.core.data.rows import Place
from regraft.core.training.model import memory
from regraft.core.training.modes import without_dropout

if TYPE_CHECKING:
    from regraft.core.training.head import Head

ALL = ""
"""The name of all texts together; no file has it."""


def bits_per_byte(head: Head, tokenizer: Any, texts: Sequence[str], device: str) -> float:
    """-Σ log2 p over every token of every text, divided by the texts' bytes. Takes what `bits_by_name` takes."""
    return bits_by_name(head, tokenizer, {"texts": texts}, device)[ALL]


def bits_by_name(head: Head, tokenizer: Any, texts: Mapping[str, Sequence[str]], device: str) -> dict[str, float]:
    """Bits per byte of some texts by their names, and, as `ALL`, of all together.

    Each text stands alone behind the token that begins or ends texts, so that its first token counts too.

    Args:
        head: of the model.
        tokenizer: its own.
        texts: short ones, see `passages.passages`, by names such as those of files.
        device: of the model.
    """
    measured = {name: _nats_and_bytes(head, tokenizer, own, device) for name, own in texts.items()}
    measured[ALL] = sum(nats for nats, _ in measured.values()), sum(size for _, size in measured.values())
    return {name: nats / math.log(2) / max(1, size) for name, (nats, size) in measured.items()}


def _nats_and_bytes(head: Head, tokenizer: Any, texts: Sequence[str], device: str) -> tuple[float, int]:
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
    return nats, size


def start_of(tokenizer: Any) -> int | None:
    """The token that texts stand behind: that which begins them, or else ends them; None without either."""
    found: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return found

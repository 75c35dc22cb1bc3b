"""What `demo:tiny` does on text that it was not trained on: bits per byte, and recall of facts in its context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from regraft.core.demo import corpus

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

RECALL_SEED = 100
"""Another than those of training, so that the passages are new."""


@dataclass(frozen=True)
class Figures:
    """What the checkpoint does on text that it was not trained on.

    Args:
        bits_per_byte: of the held-out books, each chapter in separate windows as long as the model's context.
        tokens_per_byte: of the same text.
        recall: share of the facts of plain recall exercises that greedy decoding tells.
    """

    bits_per_byte: float
    tokens_per_byte: float
    recall: float


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which the special tokens are spelt out."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def measure(model: Any, tokenizer: Tokenizer, texts: Sequence[str], exercises: corpus.Exercises) -> Figures:
    """The figures of a model on held-out texts and on exercises built from them."""
    bits, tokens = bits_per_byte(model, tokenizer, texts)
    return Figures(bits, tokens, recall_share(model, tokenizer, exercises))


def bits_per_byte(model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[float, float]:
    """Bits per byte and tokens per byte of some texts, each read in separate windows as long as the context."""
    import torch

    window = model.config.max_position_embeddings
    nats, tokens = 0.0, 0
    for text in texts:
        ids = encode(tokenizer, text)
        tokens += len(ids)
        for start in range(0, len(ids), window):
            row = torch.tensor([[0, *ids[start : start + window]]])
            nats += _surprise(model, row).sum().item()
    size = sum(len(text.encode()) for text in texts)
    return nats / math.log(2) / size, tokens / size


def recall_share(model: Any, tokenizer: Tokenizer, exercises: corpus.Exercises, count: int = 200) -> float:
    """Share of `count` facts, each asked for after its passage, of which every token is the likeliest."""
    import torch

    random = Random(RECALL_SEED)
    right = 0
    for _ in range(count):
        passage, facts = exercises.passage(random)
        sentence = corpus.fact(*facts[0])
        known = encode(tokenizer, f"{corpus.BEGIN}{passage}\n{sentence.rpartition(' ')[0]}")
        ids = encode(tokenizer, f"{corpus.BEGIN}{passage}\n{sentence}")
        with torch.no_grad():
            guesses = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        right += guesses[len(known) - 1 : -1] == ids[len(known) :]
    return right / count


def _surprise(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of each id of `row` (1, T) but the first."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        logits = model(input_ids=row[:, :-1]).logits.float()
    return F.cross_entropy(logits[0], row[0, 1:], reduction="none")

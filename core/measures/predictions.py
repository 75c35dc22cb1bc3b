"""What a model expects of the next token: loss, entropy and confidence over given sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from regraft.core.data.batches import Batch, collate
from regraft.core.data.examples import IGNORED, Example
from regraft.core.training.head import Head
from regraft.core.training.model import memory
from regraft.core.training.modes import computing, without_dropout

_CHUNK_BYTES = 32 << 20
"""Of fp32 logits at a time; a chunk has about four copies of them."""


@dataclass(frozen=True)
class Predictions:
    """Means over positions, each of which predicts one token that counts; a figure that is not finite stays so.

    Args:
        tokens: number of positions.
        loss: cross-entropy of the true token, in nats.
        entropy: of the predicted distribution, in nats; between 0 and ln(vocabulary).
        top_probability: of the likeliest token.
    """

    tokens: int
    loss: float
    entropy: float
    top_probability: float

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is beyond a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def finite(self) -> bool:
        """Whether every figure is."""
        return all(math.isfinite(value) for value in (self.loss, self.entropy, self.top_probability, self.perplexity))

    def as_json(self) -> dict[str, float]:
        """The figures by name."""
        return {
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "entropy": self.entropy,
            "top_probability": self.top_probability,
        }


def predictions(
    head: Head, sequences: Sequence[Example], *, batch_size: int = 8, precision: str = "float32"
) -> Predictions:
    """The predictions of `head`'s model on `sequences`.

    Counted are the positions before a token whose label is not `IGNORED`: never padding, never the first token of a
    sequence. Each position counts the same, whatever its sequence; the entropy is the mean of the entropies of
    positions, not that of a mean distribution. Logits exist for some positions at a time: tokens × vocabulary is held
    only for the batch of a model whose head is not a plain matrix (see `Head.of`).

    Args:
        head: of a model; dropout is off while it runs.
        sequences: at least one with a token that counts.
        batch_size: sequences of a forward pass.
        precision: `float32` or `bfloat16`; sums and logarithms are fp32 or wider.

    Raises:
        ResourceError: out of memory.
        ValueError: no token counts.
    """
    device = next(head.model.parameters()).device
    totals, tokens = torch.zeros(3, dtype=torch.float64, device=device), 0
    with torch.no_grad(), without_dropout(head.model), memory("measuring"):
        for start in range(0, len(sequences), batch_size):
            some = sequences[start : start + batch_size]
            batch = collate(some, tuple(range(start, start + len(some))), str(device))
            for logits, labels in kept_logits(head, batch, precision):
                totals += _sums(logits, labels)
                tokens += len(labels)
    if not tokens:
        raise ValueError("no token of the sequences counts")
    loss, entropy, top = (totals / tokens).tolist()
    return Predictions(tokens, loss, entropy, top)


def kept_logits(head: Head, batch: Batch, precision: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [n, vocabulary] in fp32 and labels [n] of the positions that count, some at a time."""
    labels = batch.labels[:, 1:].flatten()
    wanted = labels != IGNORED
    labels = labels[wanted]
    with computing(batch.input_ids.device.type, precision):
        states = _states(head, batch)[:, :-1].flatten(0, 1)[wanted]
    vocabulary = head.module.weight.shape[0] if head.fused else states.shape[-1]
    step = max(1, _CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, len(labels), step):
        with computing(batch.input_ids.device.type, precision):
            chunk = _head_of(head, states[start : start + step])
        yield chunk.float(), labels[start : start + step]


def _states(head: Head, batch: Batch) -> torch.Tensor:
    """[B, T, hidden_size] that enter the head; of a head that is no plain matrix its logits."""
    if head.fused:
        return head.hidden(batch.input_ids, batch.position_ids)
    positions: dict[str, Any] = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    logits: torch.Tensor = head.model(input_ids=batch.input_ids, use_cache=False, **positions).logits
    return logits


def _head_of(head: Head, states: torch.Tensor) -> torch.Tensor:
    if not head.fused:
        return states
    weight = head.module.weight
    logits = F.linear(states.to(weight.dtype), weight, getattr(head.module, "bias", None)).float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[3] sums over positions, float64: loss, entropy, probability of the likeliest token.

    With log p = log_softmax(z): the entropy is -Σ p·log p; a token of probability 0 adds 0, not NaN.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    loss = -log_p.gather(1, labels[:, None])[:, 0]
    top = log_p.amax(dim=-1).exp()
    entropy = torch.special.entr(log_p.exp()).sum(dim=-1)
    return torch.stack([one.double().sum() for one in (loss, entropy, top)])

"""Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083): two tokenizers, one text, chunk by chunk.

Where tokens of both end at the same byte, a chunk ends, and both models say how likely it is, given what is before. The
one that learns is led to the likelihood that the other gives, so it learns what the old vocabulary's model would have
said, and not just what the text says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from regraft.core.data.batches import Batch, Batches, collate
from regraft.core.data.rows import Place
from regraft.core.training.head import Head
from regraft.plugins.tokenizer_retrofit.alignment import NO_CHUNK, Aligned, Side
from regraft.plugins.tokenizer_retrofit.spaces import joined, label_and_space_log_probs

TEMPERATURE, MARGIN = 100.0, 1e-6
"""τ and ε of the loss, as in the paper's own code."""


@dataclass(frozen=True)
class ChunkBatch:
    """Texts of B rows, and what is wanted of their C chunks.

    Args:
        batch: of the model that learns.
        chunks: [B, T] int64 the chunk, of all rows', that the next token belongs to; `NO_CHUNK` for none.
        ends: [C] int64 the last token of each chunk, counted through all rows.
        wanted: [C] log-likelihoods by the teacher, nats; fp32. NaN where a chunk has none.
    """

    batch: Batch
    chunks: torch.Tensor
    ends: torch.Tensor
    wanted: torch.Tensor

    @property
    def indices(self) -> Sequence[int]:
        """Which texts."""
        return self.batch.indices

    @property
    def tokens(self) -> int:
        """How many."""
        return self.batch.tokens


def chunk_log_probs(
    head: Head, batch: Batch, chunks: torch.Tensor, ends: torch.Tensor, spaces: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihood of each chunk, the sum over its tokens, and of a space behind it; both [C] fp32.

    Args:
        head: of the model.
        batch: B rows of T tokens.
        chunks: [B, T], see `ChunkBatch`.
        ends: [C], see there.
        spaces: [S] int64, the tokens that count as a space; None: what is behind counts as certain.
    """
    if spaces is None:
        log_probs = -head.label_losses(batch, reduction="none").float()
        behind = log_probs.new_zeros(len(ends))
    else:
        log_probs, behind = label_and_space_log_probs(head, batch.input_ids, ends, spaces)
    rows = chunks != NO_CHUNK
    return log_probs.new_zeros(len(ends)).index_add(0, chunks[rows], log_probs[rows]), behind


def next_chunks(
    sides: Sequence[Side], counts: Sequence[int], length: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, length]: the chunk of the token behind each, and [C]: the last token of each chunk, 0 for one without any.

    Chunks of later rows are counted on.
    """
    found = torch.full((len(sides), length), NO_CHUNK, dtype=torch.int64)
    ends = torch.zeros(sum(counts), dtype=torch.int64)
    for row, (side, first) in enumerate(zip(sides, accumulate([0, *counts]), strict=False)):
        own = torch.tensor(side.chunks[1:], dtype=torch.int64)
        found[row, : len(own)] = torch.where(own == NO_CHUNK, own, own + first)
        for place, chunk in enumerate(side.chunks):
            if chunk != NO_CHUNK:
                ends[first + chunk] = row * length + place
    return found.to(device), ends.to(device)


@dataclass(frozen=True)
class LikelihoodMatching:
    """Binary cross-entropy of chunks, p = exp(log p / τ - ε); the unit is a chunk.

    -[p_T·log p_S + (1 - p_T)·log(1 - p_S)], least where both are as likely.

    Args:
        head: of the model that learns.
        spaces: ids of its tokens that count as a space behind a chunk; None leaves out what is behind.
    """

    head: Head
    spaces: Sequence[int] | None = None

    def __call__(self, batch: ChunkBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The sum over chunks; `gap` is how far the log-likelihoods are apart, in nats."""
        spaces = None if self.spaces is None else torch.tensor(self.spaces, device=batch.ends.device)
        likely, behind = chunk_log_probs(self.head, batch.batch, batch.chunks, batch.ends, spaces)
        there = ~batch.wanted.isnan()
        found, wanted = (likely + behind)[there], batch.wanted[there]
        return matching_loss(found, wanted).sum(), {"gap": (found - wanted).detach().abs().sum()}

    def identity(self) -> Mapping[str, Any]:
        """Its name and constants; the teacher follows from the checkpoint."""
        return {"name": "likelihood matching", "temperature": TEMPERATURE, "margin": MARGIN,
                "append_space": self.spaces is not None}  # fmt: skip


def matching_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The loss of each chunk from the log-likelihoods by the learner and by the teacher, [C] fp32."""
    log_share = found / TEMPERATURE - MARGIN
    share = torch.exp(wanted / TEMPERATURE - MARGIN)
    return -(share * log_share + (1 - share) * torch.log(-torch.expm1(log_share)))


@dataclass(frozen=True)
class ChunkSteps:
    """The steps of the training: `core.training.steps.Steps`.

    Args:
        batches: of the new side's examples.
        texts: both sides, by example.
        wanted: log-likelihoods of a text's chunks by the teacher, by example: those that the steps come to.
    """

    batches: Batches
    texts: Sequence[Aligned]
    wanted: Mapping[int, torch.Tensor] = field(repr=False)

    @property
    def rank(self) -> int:
        """This process."""
        return self.batches.rank

    @property
    def world(self) -> int:
        """How many processes there are."""
        return self.batches.world

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.batches)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.batches.per_epoch

    def units(self, step: int) -> int:
        """Chunks."""
        return sum(int((~self.wanted[index].isnan()).sum()) for index in self.batches.indices(step))

    def micro(self, step: int, device: str = "cpu") -> list[ChunkBatch]:
        """Piece by piece."""
        return [self._piece(batch, device) for batch in self.batches.micro(step, device)]

    def places(self, indices: Sequence[int]) -> list[Place]:
        """Which texts."""
        return self.batches.places(indices)

    def identity(self) -> dict[str, object]:
        """The batches, and how the teacher's side was cut."""
        hasher = hashlib.sha256()
        for text in self.texts:
            hasher.update(f"{list(text.old.example.ids)}{list(text.old.chunks)}{list(text.new.chunks)}".encode())
        return {**self.batches.identity(), "chunks": hasher.hexdigest()}

    def _piece(self, batch: Batch, device: str) -> ChunkBatch:
        texts = [self.texts[index] for index in batch.indices]
        counts = [text.count for text in texts]
        chunks, ends = next_chunks([text.new for text in texts], counts, batch.input_ids.shape[1], device)
        return ChunkBatch(batch, chunks, ends, torch.cat([self.wanted[index] for index in batch.indices]).to(device))


def teacher_log_probs(
    head: Head, text: Aligned, device: str, *, spaces: Sequence[int] | None, append_space: bool, join_below: float
) -> tuple[Aligned, torch.Tensor]:
    """What the old model says of a text's chunks, and the text with the chunks that it says so of.

    Args:
        head: of the old model.
        text: aligned.
        device: of the model.
        spaces: ids of the old tokens that count as a space; None where neither of the next two needs them.
        append_space: whether a chunk counts together with a space behind it.
        join_below: see `spaces.joined`.

    Returns:
        The text with its chunks joined, and their log-likelihoods [C], on the CPU; NaN for those that a side lacks.
    """
    batch = collate([text.old.example], (0,), device)
    chunks, ends = next_chunks([text.old], [text.count], batch.input_ids.shape[1], device)
    ids = None if spaces is None else torch.tensor(spaces, device=device)
    found, behind = (one.cpu() for one in chunk_log_probs(head, batch, chunks, ends, ids))
    for side in (text.old, text.new):
        there = torch.zeros(text.count, dtype=torch.bool)
        there[[chunk for chunk in side.chunks if chunk != NO_CHUNK]] = True
        found[~there] = torch.nan
    if not join_below:
        return text, found + behind * append_space
    made, new = joined(text, found, behind, join_below)
    there = new != NO_CHUNK
    last = list({chunk: place for place, chunk in enumerate(new.tolist()) if chunk != NO_CHUNK}.values())
    return made, torch.zeros(made.count).index_add(0, new[there], found[there]) + behind[last] * append_space

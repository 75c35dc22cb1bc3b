"""Which sequences make which step: an order that depends on the seed alone, and tensors on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from regraft.core.data.examples import IGNORED, Example, PreferenceExample, digest, ints
from regraft.core.data.rows import Place
from regraft.core.errors import InputError, UsageError
from regraft.core.transformation import Params

if TYPE_CHECKING:
    import torch


class BatchSettings(Params):
    """How sequences are gathered into steps.

    Args:
        batch_size: sequences of a step, or pairs, over all ranks.
        micro_batch: sequences that a rank computes at once; gradients of a step are summed. None takes them all.
        epochs: passes over the data.
        steps: ends before the epochs do; None for all of them.
        shuffle: in every epoch another order.
        drop_last: leave out the last batch of an epoch if it is not full.
    """

    batch_size: Annotated[int, Field(ge=1)] = 8
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    shuffle: bool = True
    drop_last: bool = True


@dataclass(frozen=True)
class Batch:
    """Sequences of B rows and T tokens, padded on the right: causal attention never looks there, so there is no mask.

    Args:
        indices: which examples these are; B of them, or B / 2 for pairs.
        input_ids: [B, T] int64.
        labels: [B, T] int64, `IGNORED` where nothing is learnt; not shifted.
        position_ids: [B, T] int64 where sequences are packed, else None.
        learnt: number of tokens that count.
        tokens: number of tokens without padding.

    Of pairs the rows are all the chosen answers, and then all the rejected ones.
    """

    indices: tuple[int, ...]
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None
    learnt: int
    tokens: int


@dataclass(frozen=True)
class Batches:
    """The steps of a training, each to be had by its number, so that a run can go on anywhere.

    Args:
        examples: sequences, or pairs.
        settings: how they are gathered.
        seed: of the order.
        rank, world: this process and how many there are; each computes an equal share of every batch.

    Raises:
        InputError: fewer examples than a batch, where the last one is dropped.
        UsageError: a batch cannot be shared equally among the ranks.
    """

    examples: Sequence[Example | PreferenceExample]
    settings: BatchSettings = field(default_factory=BatchSettings)
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        size = self.settings.batch_size
        if size % self.world:
            raise UsageError(
                "the batch cannot be shared equally", where="batch_size", expected=f"a multiple of {self.world}",
                found=size, remedy="change batch_size or the number of processes",
            )  # fmt: skip
        if not self.examples or (self.settings.drop_last and len(self.examples) < size):
            raise InputError(
                "there are fewer sequences than a batch takes",
                where="batch_size",
                expected=f"at least {size} sequences",
                found=len(self.examples),
                remedy="give more data, a smaller batch_size, or drop_last = false",
            )

    @property
    def pairs(self) -> bool:
        """Whether the examples are preference pairs."""
        return isinstance(self.examples[0], PreferenceExample)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        count, size = len(self.examples), self.settings.batch_size
        return count // size if self.settings.drop_last else -(-count // size)

    def __len__(self) -> int:
        """Number of steps."""
        return min(self.per_epoch * self.settings.epochs, self.settings.steps or 1 << 62)

    def indices(self, step: int) -> tuple[int, ...]:
        """Which examples make step `step`, over all ranks."""
        epoch, number = divmod(step, self.per_epoch)
        order = _order(len(self.examples), self.seed, epoch) if self.settings.shuffle else range(len(self.examples))
        size = self.settings.batch_size
        return tuple(order[number * size : (number + 1) * size])

    def units(self, step: int) -> int:
        """What the loss of a step is the mean over: learnt tokens, or pairs, of all ranks."""
        examples = (self.examples[index] for index in self.indices(step))
        return sum(one.learnt if isinstance(one, Example) else 1 for one in examples)

    def micro(self, step: int, device: str = "cpu") -> list[Batch]:
        """What this rank computes in a step, piece by piece."""
        indices = self.indices(step)
        share = -(-len(indices) // self.world)
        own = indices[self.rank * share : (self.rank + 1) * share]
        size = self.settings.micro_batch or len(own) or 1
        return [self.gather(own[start : start + size], device) for start in range(0, len(own), size)]

    def gather(self, indices: Sequence[int], device: str = "cpu") -> Batch:
        """The tensors of some examples."""
        examples = [self.examples[index] for index in indices]
        sequences = [one if isinstance(one, Example) else one.chosen for one in examples]
        sequences += [one.rejected for one in examples if isinstance(one, PreferenceExample)]
        return collate(sequences, tuple(indices), device)

    def places(self, indices: Sequence[int]) -> list[Place]:
        """Where examples come from."""
        return [self.examples[index].place for index in indices]

    def identity(self) -> dict[str, object]:
        """What decides the steps, to tell whether a saved state belongs to them; JSON values."""
        given = self.settings.model_dump(mode="json")
        return {**given, "order_seed": self.seed, "world": self.world, "data": digest(self.examples)}


def collate(sequences: Sequence[Example], indices: tuple[int, ...], device: str = "cpu") -> Batch:
    """Pad `sequences` on the right to the longest."""
    import torch

    longest = max(map(len, sequences))

    def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        tensor = torch.full((len(rows), longest), value, dtype=torch.int64)
        for number, row in enumerate(rows):
            tensor[number, : len(row)] = torch.frombuffer(ints(row), dtype=torch.int32)
        return tensor.to(device)

    packed = any(one.positions is not None for one in sequences)
    return Batch(
        indices,
        padded([one.ids for one in sequences], 0),
        padded([one.labels for one in sequences], IGNORED),
        padded([_positions(one, longest) for one in sequences], 0) if packed else None,
        sum(one.learnt for one in sequences),
        sum(map(len, sequences)),
    )


def _positions(example: Example, length: int) -> Sequence[int]:
    own = range(len(example)) if example.positions is None else example.positions
    return ints([*own, *range(length - len(example))])


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)

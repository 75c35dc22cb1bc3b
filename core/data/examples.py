"""Token ids with their labels, compact: what batches are made of."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from regraft.core.data.rows import Place

IGNORED = -100
"""The label of a token that is not learnt."""


def ints(values: Iterable[int]) -> array[int]:
    """Whole numbers in four bytes each."""
    return array("i", values)


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of T tokens.

    Args:
        ids: [T] token ids.
        labels: [T]; the id where the token is learnt from those before it, `IGNORED` elsewhere.
        place: where it comes from.
        positions: [T] position ids where they are not 0 to T - 1, as in a packed sequence.
    """

    ids: array[int]
    labels: array[int]
    place: Place
    positions: array[int] | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def learnt(self) -> int:
        """Number of tokens that count in the loss: the first of a sequence has nothing before it and never does."""
        return len(self.labels) - 1 - self.labels[1:].count(IGNORED) if self.labels else 0

    def cut(self, start: int, stop: int) -> Example:
        """Tokens start to stop of a sequence that is not packed, from position 0 again."""
        assert self.positions is None
        return replace(self, ids=self.ids[start:stop], labels=self.labels[start:stop])


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """The preferred and the other answer to one prompt, each a whole sequence."""

    chosen: Example
    rejected: Example

    @property
    def place(self) -> Place:
        """Where the pair comes from."""
        return self.chosen.place

    def __len__(self) -> int:
        """Tokens of the longer sequence."""
        return max(len(self.chosen), len(self.rejected))


def digest(examples: Sequence[Example | PreferenceExample]) -> str:
    """SHA-256 over ids, labels and positions, in order: two data sets that teach the same have the same."""
    hasher = hashlib.sha256()
    for example in examples:
        sequences = (example,) if isinstance(example, Example) else (example.chosen, example.rejected)
        for one in sequences:
            hasher.update(f"{len(one)},{one.positions is not None};".encode())
            for numbers in (one.ids, one.labels, one.positions):
                hasher.update(b"" if numbers is None else numbers.tobytes())
    return hasher.hexdigest()

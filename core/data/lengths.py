"""What becomes of a sequence that is longer than it may be, or shorter."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from regraft.core.data.encode import checked
from regraft.core.data.examples import IGNORED, Example, PreferenceExample, ints
from regraft.core.errors import InputError

TooLong = Literal["refuse", "truncate", "split", "drop"]


@dataclass
class Lengths:
    """Keeps every sequence within `most` tokens, and counts what that costs.

    Args:
        most: tokens a sequence may have; None for any.
        least: shorter ones are dropped.
        too_long: `refuse` makes a longer one a bad row; `truncate` cuts its end off, which leaves an answer shorter or
            the row bad; `split` makes consecutive sequences of it; `drop` leaves it out.
    """

    most: int | None = None
    least: int = 2
    too_long: TooLong = "refuse"
    truncated: int = 0
    split: int = 0
    dropped: int = 0

    def fit(self, example: Example | PreferenceExample) -> list[Example | PreferenceExample]:
        """What is left of an example: none, one, or several.

        Raises:
            InputError: it is too long, or has nothing left to learn.
        """
        if len(example) < self.least:
            self.dropped += 1
            return []
        if self.most is None or len(example) <= self.most:
            return [example]
        if self.too_long == "drop":
            self.dropped += 1
            return []
        if self.too_long == "truncate":
            self.truncated += 1
            return [_truncated(example, self.most)]
        if self.too_long == "split" and isinstance(example, Example):
            self.split += 1
            return list(self._pieces(example, self.most))
        others = '"truncate", "split" or "drop"' if isinstance(example, Example) else '"truncate" or "drop"'
        raise InputError(f"has {len(example)} tokens", expected=f"at most {self.most}, or too_long = {others}")

    def _pieces(self, example: Example, most: int) -> list[Example]:
        pieces = [example.cut(start, start + most) for start in range(0, len(example), most)]
        kept = [piece for piece in pieces if len(piece) >= self.least and piece.learnt]
        self.dropped += len(pieces) - len(kept)
        return kept


def _truncated(example: Example | PreferenceExample, most: int) -> Example | PreferenceExample:
    if isinstance(example, Example):
        return checked(example.cut(0, most))
    return PreferenceExample(checked(example.chosen.cut(0, most)), checked(example.rejected.cut(0, most)))


def pack(examples: Iterable[Example], length: int, *, restart: bool) -> tuple[list[Example], int]:
    """One stream of all examples, in order, cut into sequences of exactly `length` tokens.

    Args:
        examples: none of them packed; one may be cut and go on in the next sequence.
        length: tokens of every sequence.
        restart: position ids begin at 0 with each example, and attention then stays within it, as transformers reads
            such positions; else the sequence is one text.

    Returns the sequences, and how many tokens at the end of the stream were too few for one.
    """
    ids, labels, positions = ints(()), ints(()), ints(())
    packed: list[Example] = []
    place = None
    for example in examples:
        place = place or example.place
        ids.extend(example.ids)
        labels.extend(ints([IGNORED]) + example.labels[1:] if restart else example.labels)
        positions.extend(range(len(example)))
        start = 0
        while len(ids) - start >= length:
            stop = start + length
            own = _from_zero(positions[start:stop]) if restart else None
            packed.append(Example(ids[start:stop], labels[start:stop], place, own))
            start, place = stop, example.place
        if start:
            del ids[:start], labels[:start], positions[:start]
            place = example.place if ids else None
    return [one for one in packed if one.learnt], len(ids)


def _from_zero(positions: array[int]) -> array[int]:
    """Positions of a sequence whose first example may have begun in the sequence before: it begins at 0 here."""
    first = positions[0]
    end = next((index for index in range(1, len(positions)) if positions[index] == 0), len(positions))
    return ints(number - first for number in positions[:end]) + positions[end:]

"""Did-you-mean: the known name that a mistyped one most likely stands for."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

MAX_DISTANCE = 2
MIN_RATIO = 0.7
"""Similarity (difflib) from which a name further away than `MAX_DISTANCE` is still worth suggesting."""
_LONGEST = 100
"""Longer words are not names: they are not compared, so that hostile input costs nothing."""


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and neighbour swaps that turn `a` into `b` (optimal string alignment)."""
    before_previous: list[int] = []
    previous = list(range(len(b) + 1))
    for i, char_a in enumerate(a, 1):
        row = [i]
        for j, char_b in enumerate(b, 1):
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (char_a != char_b))
            if i > 1 and j > 1 and char_a == b[j - 2] and a[i - 2] == char_b:
                cost = min(cost, before_previous[j - 2] + 1)
            row.append(cost)
        before_previous, previous = previous, row
    return previous[-1]


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` most likely stands for; None where nothing is near.

    Near means equal but for case, `-` and `_`; or at most two edits away, and fewer than half of the longer word's
    letters; or similar enough as a whole. Ties go to the candidate that comes first.
    """
    if not 0 < len(word) <= _LONGEST:
        return None
    ranked = [(rank, index, name) for index, name in enumerate(candidates) if (rank := _rank(word, name)) is not None]
    return min(ranked)[2] if ranked else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """The question to print, such as `did you mean "lofit"?`; None where nothing is near."""
    name = closest(word, candidates)
    return None if name is None else f'did you mean "{name}"?'


def _rank(word: str, name: str) -> tuple[int, float] | None:
    """Smaller is nearer; None is too far."""
    folded, folded_name = _fold(word), _fold(name)
    if folded == folded_name:
        return 0, 0.0
    if len(name) > _LONGEST:
        return None
    distance = edit_distance(folded, folded_name)
    if distance <= MAX_DISTANCE and 2 * distance < max(len(folded), len(folded_name)):
        return 1, float(distance)
    ratio = SequenceMatcher(None, folded, folded_name, autojunk=False).ratio()
    return (2, -ratio) if ratio >= MIN_RATIO else None


def _fold(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "").replace(" ", "")

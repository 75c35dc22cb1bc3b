"""Variety of tokens, and how much of a text stands in another. Token ids in, numbers out; no model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy

Ids = Sequence[int]


def type_token_ratio(ids: Ids, window: int | None = None) -> float:
    """Different tokens divided by tokens, over the last `window` of them; 0 of no tokens.

    A text that repeats one token has 1 / window, random tokens nearly 1: a high ratio alone does not mean a good text.

    Raises:
        ValueError: the window is less than one token.
    """
    if window is not None and window < 1:
        raise ValueError("a window has at least one token")
    tail = ids if window is None else ids[-window:]
    return len(set(tail)) / len(tail) if len(tail) else 0.0


def longest_shared_runs(texts: Sequence[Ids], corpus: Iterable[Ids]) -> list[int]:
    """For each text the longest run of tokens that stands in a sequence of `corpus` too, in tokens.

    A run never crosses from one sequence of the corpus into the next. Exact, without hashing: every position gets
    numbers that are equal where the next 1, 2, 4, ... tokens are (Karp, Miller and Rosenberg 1972), and the longest run
    follows bit by bit from the highest. Takes O(N log L) for a corpus of N tokens and texts of at most L.

    Returns:
        One number for each text, 0 where not even one token is shared.
    """
    corpus_ids = _joined(corpus)
    longest = max(map(len, texts), default=0)
    text_ids = numpy.asarray([token for text in texts for token in text], dtype=numpy.int64)
    names = _names(numpy.concatenate([corpus_ids, text_ids]), longest)
    starts = len(corpus_ids) + numpy.cumsum([0, *map(len, texts)])
    return [
        _longest(names, len(corpus_ids), int(start), int(start) + len(text))
        for start, text in zip(starts, texts, strict=False)
    ]


def citation_rate(texts: Sequence[Ids], corpus: Iterable[Ids], ngram: int) -> float:
    """Share of the texts that have `ngram` tokens in a row which stand in a sequence of `corpus` too; 0 of no texts.

    Raises:
        ValueError: the n-gram is less than one token.
    """
    return rate_of(longest_shared_runs(texts, corpus), ngram)


def rate_of(runs: Sequence[int], ngram: int) -> float:
    """Share of the runs that have at least `ngram` tokens: the citation rate, from `longest_shared_runs`.

    Raises:
        ValueError: the n-gram is less than one token.
    """
    if ngram < 1:
        raise ValueError("an n-gram has at least one token")
    return sum(run >= ngram for run in runs) / len(runs) if runs else 0.0


_Array = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.int64]]


def _joined(sequences: Iterable[Ids]) -> _Array:
    """All ids, with -1, which is no token, after each sequence."""
    parts = [numpy.asarray([*sequence, -1], dtype=numpy.int64) for sequence in sequences]
    return numpy.concatenate(parts) if parts else numpy.empty(0, dtype=numpy.int64)


def _names(ids: _Array, longest: int) -> list[_Array]:
    """Level k gives each position a number that is the same where the next 2^k ids are the same."""
    names = [numpy.unique(ids, return_inverse=True)[1]]
    while 2 ** len(names) <= min(longest, len(ids)):
        last, half = names[-1], 2 ** (len(names) - 1)
        pairs = last[:-half] * (len(ids) + 1) + last[half:]
        names.append(numpy.unique(pairs, return_inverse=True)[1])
    return names


def _longest(names: Sequence[_Array], corpus_end: int, start: int, stop: int) -> int:
    """The longest run within positions `start` to `stop` that stands before `corpus_end` too."""
    theirs, ours = numpy.arange(corpus_end), numpy.arange(start, stop)
    their_run, our_run = numpy.zeros(len(theirs), dtype=numpy.int64), numpy.zeros(len(ours), dtype=numpy.int64)
    length = 0
    for level in reversed(range(len(names))):
        more, total = names[level], length + 2**level
        fitting = theirs + total <= corpus_end
        candidates, their_keys = theirs[fitting], their_run[fitting]
        inside = ours + total <= stop
        own, our_keys = ours[inside], our_run[inside]
        their_keys = their_keys * (len(more) + 1) + more[candidates + length]
        our_keys = our_keys * (len(more) + 1) + more[own + length]
        known, found = numpy.isin(their_keys, our_keys), numpy.isin(our_keys, their_keys)
        if not found.any():
            continue
        length, theirs, ours = total, candidates[known], own[found]
        keys = numpy.concatenate([their_keys[known], our_keys[found]])
        compact = numpy.unique(keys, return_inverse=True)[1]
        their_run, our_run = compact[: len(theirs)], compact[len(theirs) :]
    return length

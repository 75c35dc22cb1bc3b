"""The merge loop of Dynamic Tokenization (arXiv 2411.18553, section 3.1): the most frequent pair, again and again."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

Word = tuple[bytes, ...]
Pair = tuple[bytes, bytes]


def merge_words(
    words: Mapping[Word, int], most: int | None, *, min_count: int, valid: Callable[[bytes], bool]
) -> tuple[dict[Word, list[bytes]], list[int]]:
    """Merge the most frequent valid pair, again and again; among pairs as frequent, that whose bytes sort first.

    A pair is counted wherever it stands, also where two overlap, and merged from left to right without overlap.

    Args:
        words: how often each sequence of tokens stands in the batch; nothing is merged across its ends.
        most: merges; None goes on until no pair is left.
        min_count: pairs that stand there less often are left alone.
        valid: whether a token may have these bytes.

    Returns:
        What each word becomes, and how many tokens each merge saved.
    """
    table = _Pairs(words, min_count, valid)
    saved: list[int] = []
    while (most is None or len(saved) < most) and (pair := table.best()) is not None:
        saved.append(table.merge(pair))
    return dict(zip(words, table.words, strict=True)), saved


class _Pairs:
    """Words, how often each pair stands in them, and a heap of pairs; a merge touches only words that have the pair."""

    def __init__(self, words: Mapping[Word, int], min_count: int, valid: Callable[[bytes], bool]) -> None:
        self.words = [list(word) for word in words]
        self.counts = list(words.values())
        self.min_count = min_count
        self.valid = valid
        self.pairs: Counter[Pair] = Counter()
        self.where: dict[Pair, set[int]] = defaultdict(set)
        self.heap: list[tuple[int, bytes, Pair]] = []
        for number, word in enumerate(self.words):
            self._count(word, number, 1)
        for pair in self.pairs:
            self._offer(pair)

    def _count(self, word: list[bytes], number: int, sign: int) -> None:
        for pair in pairwise(word):
            self.pairs[pair] += sign * self.counts[number]
            if sign > 0:
                self.where[pair].add(number)

    def _offer(self, pair: Pair) -> None:
        joined = pair[0] + pair[1]
        if self.pairs[pair] >= self.min_count and self.valid(joined):
            heapq.heappush(self.heap, (-self.pairs[pair], joined, pair))

    def best(self) -> Pair | None:
        """The next pair; an entry whose count has sunk is put back with the true one."""
        while self.heap:
            negative, _, pair = heapq.heappop(self.heap)
            if self.pairs[pair] == -negative:
                return pair
            if self.pairs[pair] < -negative:
                self._offer(pair)
        return None

    def merge(self, pair: Pair) -> int:
        """Join the pair everywhere; the number of tokens that this saves."""
        joined, saved = pair[0] + pair[1], 0
        changed: set[Pair] = set()
        for number in self.where.pop(pair):
            old = self.words[number]
            new = _joined(old, pair, joined)
            if len(new) == len(old):
                continue
            saved += self.counts[number] * (len(old) - len(new))
            self._count(old, number, -1)
            self._count(new, number, 1)
            changed.update(come for come in pairwise(new) if joined in come)
            self.words[number] = new
        for come in changed:
            self._offer(come)
        return saved


def _joined(word: Iterable[bytes], pair: Pair, joined: bytes) -> list[bytes]:
    out: list[bytes] = []
    held: bytes | None = None
    for part in word:
        if held == pair[0] and part == pair[1]:
            out.append(joined)
            held = None
            continue
        if held is not None:
            out.append(held)
        held = part
    return out if held is None else [*out, held]

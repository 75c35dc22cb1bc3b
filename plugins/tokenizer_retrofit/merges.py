"""Byte-pair merges learnt from counted words: the batch merging of Dynamic Tokenization, frozen to a corpus.

Feher, Vulić and Minixhofer (arXiv 2411.18553, section 3.1) merge the most frequent adjacent pair again and again, and
count everything anew each time. Here a merge touches only the words that have the pair: counts are kept by pair, an
index says which words may hold it, and a heap offers the next one. The merges are the same, ties included.
"""

from __future__ import annotations

import heapq
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

Word = tuple[str, ...]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Merge:
    """Two tokens that become one.

    Args:
        left, right: the parts, which are tokens before it.
        token: the new one.
        count: how often the two stood side by side in the corpus when it was chosen.
    """

    left: str
    right: str
    token: str
    count: int


def learn_merges(
    words: Mapping[Word, int],
    size: int,
    *,
    taken: Iterable[str] = (),
    min_count: int = 1,
    max_length: int | None = None,
    join: Callable[[str, str], str] = operator.add,
    tell: Callable[[int], None] | None = None,
) -> list[Merge]:
    """The first `size` merges of the most frequent pair; among pairs as frequent, the one that sorts first.

    A pair is counted wherever it stands, also where two overlap (`x x x` holds `x x` twice), and merged from left to
    right without overlap. A merge whose token exists already is never made: so each new token has one composition.

    Args:
        words: how often each word, a sequence of tokens, stands in the corpus. Merges never leave a word.
        size: most merges; fewer if the pairs run out.
        taken: tokens that exist and that no merge may make again.
        min_count: pairs seen less often are left alone.
        max_length: of a new token, in characters of the words' alphabet.
        join: the token that two make.
        tell: called with the number of merges made so far, now and then.

    Returns:
        The merges in order. Takes time in proportion to the words that each merge touches.
    """
    table = _Table(words, min_count, join)
    made = set(taken)
    merges: list[Merge] = []
    while len(merges) < size and (found := table.best()) is not None:
        pair, token, count = found
        if token in made or (max_length is not None and len(token) > max_length):
            table.forbid(pair)
            continue
        made.add(token)
        merges.append(Merge(*pair, token, count))
        table.merge(pair, token)
        if tell is not None and len(merges) % 64 == 0:
            tell(len(merges))
    return merges


def merged(word: Iterable[str], pair: Pair, token: str) -> list[str]:
    """The word with each `pair` replaced by `token`, from left to right, without overlap."""
    out: list[str] = []
    held: str | None = None
    for part in word:
        if held == pair[0] and part == pair[1]:
            out.append(token)
            held = None
            continue
        if held is not None:
            out.append(held)
        held = part
    return out if held is None else [*out, held]


class _Table:
    """Words, how often each pair stands in them, and the pairs in the order in which they are merged."""

    def __init__(self, words: Mapping[Word, int], min_count: int, join: Callable[[str, str], str]) -> None:
        self.words = [list(word) for word in words]
        self.counts = list(words.values())
        self.min_count = min_count
        self.join = join
        self.pairs: Counter[Pair] = Counter()
        self.where: dict[Pair, set[int]] = defaultdict(set)
        self.forbidden: set[Pair] = set()
        for number, word in enumerate(self.words):
            for pair in pairwise(word):
                self.pairs[pair] += self.counts[number]
                self.where[pair].add(number)
        self.heap = [(-count, join(*pair), pair) for pair, count in self.pairs.items() if count >= min_count]
        heapq.heapify(self.heap)

    def best(self) -> tuple[Pair, str, int] | None:
        """The pair to merge next, its token and its count; an entry with an old count is put back with the true one."""
        while self.heap:
            negative, token, pair = heapq.heappop(self.heap)
            count = self.pairs.get(pair, 0)
            if pair in self.forbidden or count < self.min_count:
                continue
            if count == -negative:
                return pair, token, count
            if count < -negative:
                heapq.heappush(self.heap, (-count, token, pair))
        return None

    def forbid(self, pair: Pair) -> None:
        """Never offer this pair."""
        self.forbidden.add(pair)

    def merge(self, pair: Pair, token: str) -> None:
        """Rewrite the words that hold the pair, and what they count."""
        changed: set[Pair] = set()
        for number in self.where.pop(pair):
            old, count = self.words[number], self.counts[number]
            new = merged(old, pair, token)
            if len(new) == len(old):
                continue
            for gone in pairwise(old):
                self.pairs[gone] -= count
            for come in pairwise(new):
                self.pairs[come] += count
                self.where[come].add(number)
                if token in come:
                    changed.add(come)
            self.words[number] = new
        del self.pairs[pair]
        for come in changed:
            if self.pairs[come] >= self.min_count:
                heapq.heappush(self.heap, (-self.pairs[come], self.join(*come), come))

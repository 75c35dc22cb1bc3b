"""Texts as two tokenizers cut them, in chunks that begin and end at the same bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from regraft.core.data.examples import IGNORED, Example, ints
from regraft.core.data.rows import Place
from regraft.plugins.tokenizer_retrofit.bits import start_of
from regraft.plugins.tokenizer_retrofit.passages import passages
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

NO_CHUNK = -1
"""Of a token whose likelihood is not looked at."""

_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Side:
    """A text as one tokenizer cuts it.

    Args:
        example: its ids, behind the token that begins texts.
        chunks: the chunk of each id; `NO_CHUNK` for the first one, which nothing stands before.
    """

    example: Example
    chunks: Sequence[int]


@dataclass(frozen=True)
class Aligned:
    """A text as both tokenizers cut it.

    Args:
        old, new: the two sides.
        count: of the chunks.
    """

    old: Side
    new: Side
    count: int


@dataclass(frozen=True)
class Cutter:
    """A tokenizer, and the bytes of its tokens.

    Args:
        tokenizer: of transformers.
        file: the same as a file.
    """

    tokenizer: Any
    file: TokenizerFile

    def cut(self, text: str) -> tuple[list[int], list[bytes]] | None:
        """Ids of the text and the bytes of each; None where one has none."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        spelt = [self.file.bytes_of(self.file.tokens[index]) if index in self.file.tokens else None for index in ids]
        known = [one for one in spelt if one is not None]
        return (ids, known) if len(known) == len(ids) else None

    def side(self, ids: Sequence[int], chunks: Sequence[int], number: int) -> Side:
        """Behind the token that begins texts; without one, the first token has no likelihood, nor has its chunk."""
        start = start_of(self.tokenizer)
        whole = [*([] if start is None else [start]), *ids]
        own = [NO_CHUNK, *chunks] if start is not None else [NO_CHUNK if one == 0 else one for one in chunks]
        return Side(Example(ints(whole), ints([IGNORED, *whole[1:]]), Place("text", number)), own)


def align(one: Sequence[int], other: Sequence[int]) -> tuple[list[int], list[int]]:
    """The chunk of each token of two cuts of the same bytes, from the tokens' lengths in bytes.

    A chunk ends wherever tokens of both end; tokens of no bytes belong to the chunk that goes on.
    """
    ends, others = list(accumulate(one)), list(accumulate(other))
    shared = sorted({*ends} & {*others} - {0})
    first, second = ([bisect_left(shared, end) for end in own] for own in (ends, others))
    return first, second


def cut(texts: Iterable[str], tokens: int) -> Iterator[str]:
    """Passages of about so many tokens, one after the other."""
    return (piece for text in texts for piece in passages([text], nbytes=_BYTES_PER_TOKEN * tokens))


def aligned_texts(
    texts: Iterable[str], old: Cutter, new: Cutter, *, tokens: int, window: int
) -> Iterator[Aligned | None]:
    """Passages as both cut them, in two where they are too long; None for one that they do not spell alike.

    Args:
        texts: passages.
        old, new: the tokenizers.
        tokens: most of the new one, for a passage; `window`: most of the old one.
        window: see `tokens`.
    """
    number = 0
    for passage in texts:
        open_ = [passage]
        while open_:
            text = open_.pop()
            one, other = old.cut(text), new.cut(text)
            number += 1
            if one is None or other is None:
                yield None
            elif len(text) > 1 and (len(one[0]) >= window or len(other[0]) >= tokens):
                middle = text.find(" ", len(text) // 2, len(text) - 1)
                middle = middle if middle > 0 else len(text) // 2
                open_ += [text[middle:], text[:middle]]
            else:
                yield _aligned(old, one, new, other, number)


def _aligned(
    old: Cutter, one: tuple[list[int], list[bytes]], new: Cutter, other: tuple[list[int], list[bytes]], number: int
) -> Aligned | None:
    """A passage of two cuts; None where the bytes differ or no chunk is there on both sides."""
    lengths = _same_bytes(one[1], other[1])
    if lengths is None:
        return None
    first, second = align(*lengths)
    sides = old.side(one[0], first, number), new.side(other[0], second, number)
    there = {*sides[0].chunks} & {*sides[1].chunks} - {NO_CHUNK}
    return Aligned(*sides, first[-1] + 1) if there else None


def _same_bytes(one: Sequence[bytes], other: Sequence[bytes]) -> tuple[list[int], list[int]] | None:
    """Lengths of tokens that spell the same bytes but for a space before; None where they do not, or none is there."""
    texts = b"".join(one), b"".join(other)
    lengths = [len(token) for token in one], [len(token) for token in other]
    for place in (0, 1):
        if texts[place] == b" " + texts[1 - place] and lengths[place][0]:
            lengths[place][0] -= 1
            return lengths
    return lengths if texts[0] == texts[1] and texts[0] else None

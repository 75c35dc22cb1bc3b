"""Filler text: sentences made up from a few words, or those of the user's file, as long as needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from regraft.core.errors import InputError

_WHO = (
    "the old farmer", "a young sailor", "the baker", "her brother", "the quiet teacher", "a traveller", "the gardener",
    "my neighbour", "the carpenter", "a shepherd", "the fisherman", "their aunt", "the miller", "a soldier",
    "the weaver", "an old friend",
)  # fmt: skip
_DID = (
    "carried", "found", "washed", "mended", "forgot", "sold", "painted", "brought back", "looked for", "hid", "admired",
    "dropped", "counted", "wrapped up", "gave away", "borrowed",
)  # fmt: skip
_WHAT = (
    "a basket of apples", "the blue lantern", "two loaves of bread", "an empty barrel", "the wooden chair",
    "a bundle of letters", "the silver spoon", "a coil of rope", "the heavy coat", "a jar of honey", "the garden gate",
    "a pair of shoes", "the broken clock", "a sack of flour", "the green ribbon", "a small boat",
)  # fmt: skip
_WHERE = (
    "by the river", "before the rain began", "in the market", "on the way home", "behind the barn", "after supper",
    "under the bridge", "at the edge of the forest", "near the old mill", "while the others slept", "in the orchard",
    "early in the morning", "at the foot of the hill", "when the bells rang", "beside the road", "late in autumn",
)  # fmt: skip

_SENTENCE_TOKENS = 16
"""A first guess."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def sentences(random: Random, text: Path | None = None) -> Iterator[str]:
    """Sentences without end.

    Args:
        random: draws them, or the place in the text to begin at.
        text: a file, read round and round; None makes sentences up.

    Raises:
        InputError: the file cannot be read, or has no sentence.
    """
    if text is None:
        while True:
            who, did, what, where = (random.choice(words) for words in (_WHO, _DID, _WHAT, _WHERE))
            yield f"{who[0].upper()}{who[1:]} {did} {what} {where}."
    found = _sentences_of(text)
    yield from islice(cycle(found), random.randrange(len(found)), None)


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that goes on: with what the tokenizer puts before it, without an end token behind."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def passage(tokenizer: Any, lines: Iterator[str], length: int) -> list[int]:
    """The first `length` tokens of some sentences. Raises as `fill`."""
    taken = fill(lines, lambda some: len(tokens(tokenizer, "\n".join(some))), length - 1)
    return tokens(tokenizer, "\n".join(taken))[:length]


def fill(lines: Iterator[str], count: Callable[[Sequence[str]], int], room: int) -> list[str]:
    """So many sentences that they take more tokens than there is room for; one less, or a few, would fit.

    Args:
        lines: sentences without end.
        count: tokens that sentences take.
        room: tokens.

    Raises:
        InputError: the sentences have no tokens.
    """
    taken: list[str] = []
    first = used = count(taken)
    while used <= room:
        before = used
        share = (used - first) / len(taken) if taken else _SENTENCE_TOKENS
        taken += islice(lines, 1 + int((room - used) / share))
        used = count(taken)
        if used <= before:
            remedy = "give a text that the tokenizer knows"
            raise InputError("the text has no tokens", where="the text", found=repr(taken[-1]), remedy=remedy)
    return taken


def _sentences_of(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot be read", where=path, expected="a text file in UTF-8", found=error) from None
    found = [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    if not found:
        raise InputError("has no text", where=path, expected="at least one sentence", remedy="give another file")
    return found

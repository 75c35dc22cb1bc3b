"""The vocabulary of a GGUF file: its tokens by kind, and the merges that build them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.core.gguf.metadata import Metadata
from regraft.core.jsonio import brief

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of token, numbered as in llama.cpp."""

WORD_START = "\u2581"
"""SentencePiece's mark for a space."""

_PLACEHOLDER = re.compile(r"\[PAD\d+\]")
_TOKENS, _KINDS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by text, and their kinds by id.

    Args:
        texts: of every id; placeholders for rows without a token included.
        ids: of every real token.
        kinds: of every id, in llama.cpp's numbers.
    """

    texts: list[str]
    ids: Mapping[str, int]
    kinds: list[int]

    def of_kind(self, *kinds: int) -> Iterator[tuple[int, str]]:
        """Ids and texts of the real tokens of some kinds, in order of ids."""
        return ((id_, text) for text, id_ in self.ids.items() if self.kinds[id_] in kinds)


def read_vocabulary(meta: Metadata, rows: int, *, spaces_marked: bool) -> Vocabulary:
    """The vocabulary of a file.

    Args:
        meta: its metadata.
        rows: of the embedding.
        spaces_marked: spell tokens that are nothing but spaces as SentencePiece does, so that the merges that make them
            are found; the converter spells them plainly.

    Raises:
        InputError: no tokens, more tokens than rows, a token twice, or another number of kinds.
    """
    texts = meta.sequence(_TOKENS, str)
    if not texts or len(texts) > rows:
        raise meta.fault(
            _TOKENS, "the vocabulary does not fit the embedding", expected=f"1 to {rows} tokens", found=len(texts)
        )
    kinds = meta.sequence(_KINDS, int, len(texts)) if meta.has(_KINDS) else [NORMAL] * len(texts)
    if spaces_marked:
        texts = [WORD_START * len(text) if text and not text.strip(" ") else text for text in texts]
    ids: dict[str, int] = {}
    for id_, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if not text or (kind == UNUSED and _PLACEHOLDER.fullmatch(text)):
            continue
        if text in ids:
            raise meta.fault(
                _TOKENS,
                "the vocabulary holds a token twice",
                expected="unique tokens",
                found=f"{brief(text)} with ids {ids[text]} and {id_}",
            )
        ids[text] = id_
    return Vocabulary(texts, ids, kinds)


def written_merges(meta: Metadata, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that the file lists; empty if it lists none.

    Raises:
        InputError: a merge that is no pair, or of tokens that the vocabulary lacks.
    """
    merges = []
    for index, line in enumerate(meta.sequence(_MERGES, str)):
        left, space, right = _halves(line)
        if not space or left not in ids or right not in ids or left + right not in ids:
            raise meta.fault(
                _MERGES,
                "a merge does not fit the vocabulary",
                expected="two tokens that make a third",
                found=f"{brief(line)} at position {index}",
            )
        merges.append((left, right))
    return merges


def _halves(line: str) -> tuple[str, str, str]:
    """The two tokens of a merge; the first may begin with the space that otherwise divides them."""
    at = line.find(" ", 1)
    return (line[:at], " ", line[at + 1 :]) if at > 0 else (line, "", "")


def derived_merges(vocabulary: Vocabulary, ranks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: every pair of tokens that makes a third, best first.

    Args:
        vocabulary: of the file.
        ranks: the score of each token; a higher one merges first. Among equals the order is that of transformers'
            conversion (longer left halves first, then longer right halves, then earlier ids), so that ids agree with
            the published tokenizer.json files.
    """
    mergeable = {text: None for _, text in vocabulary.of_kind(NORMAL, USER_DEFINED, UNUSED)}
    pairs = [(ranks[text], *pair) for text in mergeable for pair in _splits(text, mergeable)]
    pairs.sort(key=lambda pair: (pair[0], len(pair[1]), len(pair[2])), reverse=True)
    return [(left, right) for _, left, right in pairs]


def _splits(text: str, parts: Collection[str]) -> Iterator[tuple[str, str]]:
    for at in range(1, len(text)):
        if text[:at] in parts and text[at:] in parts:
            yield text[:at], text[at:]

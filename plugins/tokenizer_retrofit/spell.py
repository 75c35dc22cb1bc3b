"""Which old tokens spell the bytes of a new one: what vocabularies of different kinds are compared by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from regraft.plugins.tokenizer_retrofit.spelling import CONTINUES, SPACE, byte_piece, byte_text
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import Origin


class Speller:
    """Spells bytes with the model of a tokenizer, without its normaliser and pre-tokenizer.

    Args:
        old: the vocabulary that spells.
    """

    def __init__(self, old: TokenizerFile) -> None:
        self.old = old
        self.model = old.backend().model

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The token of each sequence of bytes; a real piece wins over a byte piece, the smaller id over the larger."""
        found: dict[bytes, int] = {}
        pieces = {byte_piece(byte) for byte in range(256)}
        tokens = [*((t, i) for t, i in self.old.vocab.items() if t not in pieces), *self.old.vocab.items()]
        for token, index in tokens:
            data = self.old.bytes_of(token) if token not in self.old.verbatim else None
            if data:
                found.setdefault(data, index)
        return found

    def origins(self, new: TokenizerFile, rows: int) -> list[Origin]:
        """Of the rows of a new vocabulary: copies of tokens that have the same bytes, and the spelling of the others.

        Args:
            new: the new vocabulary.
            rows: of the new embeddings.
        """
        found = [Origin()] * rows
        for token, index in new.ids.items():
            found[index] = self._origin(new, token)
        return found

    def _origin(self, new: TokenizerFile, token: str) -> Origin:
        if token in new.verbatim and token in self.old.ids:
            return Origin(kept=self.old.ids[token])
        if token in self.old.vocab and new.spelling == self.old.spelling and token not in new.verbatim:
            return Origin(kept=self.old.vocab[token])
        data = new.bytes_of(token)
        if not data:
            return Origin()
        if data in self.by_bytes and token not in new.verbatim:
            return Origin(kept=self.by_bytes[data])
        return Origin(parts=tuple(self.spell(data)))

    def spell(self, data: bytes) -> Iterator[int]:
        """Ids of old tokens that spell the bytes; bytes for which there is none are left out."""
        if self.old.spelling == "bytes":
            return self._known(token.value for token in self.model.tokenize(byte_text(data)))
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return self._known(map(byte_piece, data))
        if self.old.spelling == "words":
            return self._known(self._longest(text))
        return self._known(token.value for token in self.model.tokenize(text.replace(" ", SPACE)))

    def _known(self, tokens: Iterable[str]) -> Iterator[int]:
        return (self.old.vocab[token] for token in tokens if token in self.old.vocab and token != self.old.unknown)

    def _longest(self, text: str) -> Iterator[str]:
        """Longest match from the left, as WordPiece does it, also from inside a word."""
        inside = not text.startswith(" ")
        text = text.removeprefix(" ")
        start = 0
        while start < len(text):
            mark = CONTINUES if inside or start else ""
            stops = range(len(text), start, -1)
            stop = next((end for end in stops if mark + text[start:end] in self.old.vocab), None)
            if stop is None:
                start += 1
                continue
            yield mark + text[start:stop]
            start = stop

"""Bytes of a tokenizer's tokens, and tokens of bytes."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer

_SPACE, _CONTINUES = "\u2581", "##"


class Spelling:
    """Bytes of the tokenizer's tokens, and tokens of bytes.

    Args:
        tokenizer: as `tokenizers` runs it.
        kind: `bytes`: byte-level. `pieces`: SentencePiece. `words`: WordPiece, where a word begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, kind: str) -> None:
        self.kind = kind
        self.model = tokenizer.model
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in plain]
        self.characters = {byte: chr(byte) for byte in plain}
        self.characters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
        self.bytes = {character: byte for byte, character in self.characters.items()}
        self.byte_pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} if kind == "pieces" else {}
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[0] in self.byte_pieces, item[1]))
        self.vocab = {token: index for token, index in vocabulary if token not in added}
        self.data = {index: self._read(token) for token, index in self.vocab.items()}
        self.own: dict[bytes, int] = {}
        for index, data in self.data.items():
            self.own.setdefault(data, index)
        self.known: dict[bytes, tuple[int, ...]] = {}

    def _read(self, token: str) -> bytes:
        if self.kind == "bytes":
            return bytes(map(self.bytes.__getitem__, token)) if all(map(self.bytes.__contains__, token)) else b""
        if token in self.byte_pieces:
            return bytes([self.byte_pieces[token]])
        if self.kind == "pieces":
            return token.replace(_SPACE, " ").encode("utf-8", "surrogatepass")
        inside = token.startswith(_CONTINUES) and len(token) > len(_CONTINUES)
        return (token[len(_CONTINUES) :] if inside else " " + token).encode("utf-8", "surrogatepass")

    def ids(self, data: bytes) -> tuple[int, ...]:
        """The token that has these bytes, or those that the tokenizer's model spells them with; () if it cannot."""
        if data not in self.known:
            own = self.own.get(data)
            found = (own,) if own is not None else tuple(self._spell(data))
            self.known[data] = found if b"".join(self.data.get(index, b"") for index in found) == data else ()
        return self.known[data]

    def _spell(self, data: bytes) -> Iterator[int]:
        if self.kind == "bytes":
            return (token.id for token in self.model.tokenize("".join(map(self.characters.__getitem__, data))))
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return (self.vocab.get(f"<0x{byte:02X}>", -1) for byte in data)
        if self.kind == "words":
            return self._longest(text)
        return (token.id for token in self.model.tokenize(text.replace(" ", _SPACE)))

    def _longest(self, text: str) -> Iterator[int]:
        inside, text = not text.startswith(" "), text.removeprefix(" ")
        start = 0
        while start < len(text):
            mark = _CONTINUES if inside or start else ""
            stops = range(len(text), start, -1)
            stop = next((end for end in stops if mark + text[start:end] in self.vocab), None)
            if stop is None:
                return
            yield self.vocab[mark + text[start:stop]]
            start = stop

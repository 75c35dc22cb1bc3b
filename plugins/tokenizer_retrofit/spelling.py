"""How the tokens of a vocabulary spell bytes: byte-level characters, SentencePiece pieces, WordPiece."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

Spelling = Literal["bytes", "pieces", "words"]

SPACE = "\u2581"
"""SentencePiece's mark for a space."""
CONTINUES = "##"
"""WordPiece's mark of a token inside a word."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[int, str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


CHARACTERS: Mapping[int, str] = MappingProxyType(_byte_characters())
"""The character that byte-level tokenizers write for a byte."""
_BYTES: Mapping[str, int] = MappingProxyType({character: byte for byte, character in CHARACTERS.items()})


def byte_text(data: bytes) -> str:
    """Bytes in the byte-level alphabet."""
    return "".join(map(CHARACTERS.__getitem__, data))


def byte_piece(byte: int) -> str:
    """The SentencePiece token of one byte."""
    return f"<0x{byte:02X}>"


def bytes_of(token: str, spelling: Spelling) -> bytes | None:
    """The bytes that a token of text stands for; None for one that spells none.

    A space before a word counts as a byte for all three, so the same text has the same bytes in each vocabulary.
    Tokens that are matched verbatim, such as `<|end|>`, are not for this function: their bytes are their UTF-8.
    """
    return _READERS[spelling](token)


def _bytes(token: str) -> bytes | None:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return None


def _pieces(token: str) -> bytes:
    if found := _BYTE_PIECE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace(SPACE, " ").encode("utf-8", "surrogatepass")


def _words(token: str) -> bytes:
    inside = token.startswith(CONTINUES) and len(token) > len(CONTINUES)
    return (token[len(CONTINUES) :] if inside else " " + token).encode("utf-8", "surrogatepass")


_READERS: Mapping[Spelling, Callable[[str], bytes | None]] = MappingProxyType(
    {"bytes": _bytes, "pieces": _pieces, "words": _words}
)

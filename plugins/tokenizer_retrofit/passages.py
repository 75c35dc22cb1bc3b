"""Texts cut by bytes, so that they are the same for every tokenizer. Light: no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from regraft.core.checkpoint import Checkpoint

PASSAGE_BYTES = 700
"""Of a passage."""


def passage_bytes(checkpoint: Checkpoint) -> int:
    """Of the longest passage that any tokenizer writes in fewer tokens than the model has positions."""
    return max(1, min(PASSAGE_BYTES, window_tokens(checkpoint) - 2))


def window_tokens(checkpoint: Checkpoint) -> int:
    """Tokens that the model reads at most; where the config does not say, those of a passage."""
    return checkpoint.window or PASSAGE_BYTES + 2


def passages(texts: Sequence[str], *, nbytes: int = PASSAGE_BYTES) -> list[str]:
    """The texts cut into passages of at most so many UTF-8 bytes, between characters."""
    return [passage for text in texts for passage in _cut(text, nbytes)]


def _cut(text: str, nbytes: int) -> Iterator[str]:
    data = text.encode()
    start = 0
    while start < len(data):
        piece = data[start : start + nbytes].decode(errors="ignore")
        yield piece
        start += len(piece.encode())

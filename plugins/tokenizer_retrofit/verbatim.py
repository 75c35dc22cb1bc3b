"""Where the added tokens of a tokenizer stand in a text, by the rules of the `tokenizers` library, and what is between.

Those that are not matched in normalised text come first; the rest of the text is normalised piece by piece, and then
the others are looked for. Of several that begin at one place the longest is meant; one that is then refused because it
is no word of its own is passed over with all its characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from regraft.plugins.tokenizer_retrofit.tokenizer_file import AddedToken, TokenizerFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORD = re.compile(r"\w")

Matcher = Callable[[str], Iterator[str]]
"""From a text to its pieces outside of some tokens."""


def between(file: TokenizerFile, backend: Tokenizer) -> Matcher:
    """From a text to its normalised pieces outside of added tokens.

    Args:
        file: the tokenizer.
        backend: the same, as it runs.
    """
    normalizer = backend.normalizer
    normal: Callable[[str], str] = normalizer.normalize_str if normalizer is not None else str
    raw = _outside({token.content: token for token in file.added if not token.normalized})
    late = _outside({normal(token.content): token for token in file.added if token.normalized})
    return lambda text: (piece for part in raw(text) for piece in late(normal(part)))


def _outside(tokens: Mapping[str, AddedToken]) -> Matcher:
    """Of tokens by the texts that they are matched by."""
    texts = sorted(filter(None, tokens), key=lambda text: (-len(text), text))
    if not texts:
        return lambda text: iter((text,))
    pattern = re.compile("|".join(map(re.escape, texts)))

    def pieces(text: str) -> Iterator[str]:
        done = 0
        for match in pattern.finditer(text):
            token, (start, stop) = tokens[match[0]], match.span()
            if token.single_word and (_WORD.match(text, stop) or (start and _WORD.match(text, start - 1))):
                continue
            while token.lstrip and start > done and text[start - 1].isspace():
                start -= 1
            while token.rstrip and stop < len(text) and text[stop].isspace():
                stop += 1
            if done < start:
                yield text[done:start]
            done = stop
        if done < len(text):
            yield text[done:]

    return pieces

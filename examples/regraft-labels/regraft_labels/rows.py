"""Words and their labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from regraft import InputError


@dataclass(frozen=True)
class Sentence:
    """Words and as many labels."""

    tokens: list[str]
    labels: list[str]

    @property
    def text(self) -> str:
        """The words with a blank between them."""
        return " ".join(self.tokens)


def read_sentences(path: Path, labels: list[str]) -> list[Sentence]:
    """The sentences of a file of JSON lines.

    Raises:
        InputError: it cannot be read, a line is no sentence, a label is unknown, or there are fewer than two.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the sentences cannot be read", where=path, found=error, remedy="check the path") from None
    sentences = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            sentence = Sentence(row["tokens"], row["labels"])
            right = all(isinstance(text, str) and text for text in [*sentence.tokens, *sentence.labels])
        except (ValueError, KeyError, TypeError):
            right = False
        if not right or len(sentence.tokens) != len(sentence.labels) or not sentence.tokens:
            expected = '{"tokens": ["..."], "labels": ["..."]}, as many labels as tokens'
            raise InputError("not a sentence", where=f"{path}:{number}", expected=expected, found=line[:60])
        if unknown := sorted(set(sentence.labels) - set(labels)):
            raise InputError("an unknown label", where=f"{path}:{number}", expected=", ".join(labels), found=unknown[0])
        sentences.append(sentence)
    if len(sentences) < 2:
        raise InputError("too few sentences", where=path, expected="at least 2", found=len(sentences))
    return sentences


def first_tokens(sentence: Sentence, offsets: list[tuple[int, int]]) -> list[int]:
    """The place of each word's first token.

    Args:
        sentence: its text is what was cut.
        offsets: where each token begins and ends in the text; empty ones belong to no word.
    """
    places, start = [], 0
    for word in sentence.tokens:
        places.append(next(index for index, (_, end) in enumerate(offsets) if end > start))
        start += len(word) + 1
    return places

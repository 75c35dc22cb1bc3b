"""Tiny data: rows that a tiny model learns in seconds, in the characters of the tiny tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WORDS = ("red", "blue", "green", "black", "white", "brown", "grey", "pink")
THINGS = ("stone", "leaf", "river", "hill", "cloud", "road", "field", "tree")


def write_rows(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `rows` as JSON lines, and return the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return path


def texts(count: int = 8) -> list[dict[str, str]]:
    """`count` different rows with a `text` of about twenty characters; there are 64."""
    return [{"text": f"the {thing} is {word}."} for word, thing in _pairs(count)]


def completions(count: int = 8) -> list[dict[str, str]]:
    """`count` different rows with `prompt` and `completion`: sums of two digits."""
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in _digits(count)]


def preferences(count: int = 8) -> list[dict[str, str]]:
    """`count` different rows with `prompt`, `chosen` (the sum) and `rejected` (one more)."""
    return [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a, b in _digits(count)]


def _pairs(count: int) -> list[tuple[str, str]]:
    return [(WORDS[index % 8], THINGS[(index // 8 + index) % 8]) for index in range(count)]


def _digits(count: int) -> list[tuple[int, int]]:
    return [(index % 10, (index // 10 + 3 * index) % 10) for index in range(count)]

"""How keys and values are written in messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import date, time
from pathlib import PurePath
from typing import Any

KeyPath = tuple[str | int, ...]
"""Where a value stands in a recipe: table keys, and 0-based places in arrays, such as `("steps", 0, "use")`."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST = 60


def key_text(path: KeyPath) -> str:
    """`steps[0].target_length`; a key that TOML would quote is quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _BARE_KEY.fullmatch(part) else quoted(part))
    return text


def quoted(text: str) -> str:
    """The text in double quotes, on one line, cut to a readable length."""
    shown = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    escaped = json.dumps(shown, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in escaped)


def value_text(value: Any) -> str:
    """A TOML value as a message shows it: scalars as they would be written, tables and arrays by their kind."""
    match value:
        case bool():
            return "true" if value else "false"
        case str() | PurePath():
            return quoted(str(value))
        case int() | float():
            return str(value)
        case date() | time():
            return value.isoformat()
        case dict():
            return "a table" if value else "an empty table"
        case list() | tuple():
            return _array_text(len(value))
    return "nothing" if value is None else quoted(str(value))


def _array_text(count: int) -> str:
    if count == 0:
        return "an empty array"
    return f"an array of {count} {'value' if count == 1 else 'values'}"


def either(phrases: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, last = phrases
    return f"{', '.join(first)} or {last}" if first else last


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names separated by commas; a long list is cut and says how many more there are."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more

"""Numbers and values as a page writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_LONGEST_TEXT = 300


def number(value: float | int | None) -> str:
    """Three significant digits, `1,234` for whole numbers, an en dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:.3g}"


def signed(value: float) -> str:
    """As `number`, with a plus before what is greater than zero."""
    return f"+{number(value)}" if value > 0 and math.isfinite(value) else number(value)


def nbytes(count: float) -> str:
    """`3.48 GB`; units of a thousand."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def value(item: Any) -> str:
    """Any JSON value in a line, cut where it is long."""
    if isinstance(item, int | float) or item is None:
        return number(item)
    text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def numeric(item: Any) -> bool:
    """Whether it is to be right-aligned."""
    return item is None or (isinstance(item, int | float) and not isinstance(item, bool))


def words(name: str) -> str:
    """A key as words: `tokens_per_word` is `tokens per word`."""
    return name.replace("_", " ").replace(".", ": ")


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def flattened(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by dotted key."""
    leaves: dict[str, Any] = {}
    for key, item in document.items():
        if isinstance(item, Mapping) and item:
            leaves |= flattened(item, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = item
    return leaves

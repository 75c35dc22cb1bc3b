"""A resolved recipe as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(document: Mapping[str, Any]) -> str:
    """`document` as TOML: tables for objects, arrays of tables for lists of objects; nulls, which TOML lacks, are left
    out.
    """
    return "\n".join(_table(document, ())).strip("\n") + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    below = {key: item for key, item in table.items() if _is_table(item) or _is_tables(item)}
    for key, item in table.items():
        if key not in below and item is not None:
            yield f"{_key(key)} = {_value(item)}"
    for key, item in below.items():
        inner = (*path, key)
        name = ".".join(map(_key, inner))
        for one in item if _is_tables(item) else [item]:
            yield f"\n[[{name}]]" if _is_tables(item) else f"\n[{name}]"
            yield from _table(one, inner)


def _is_table(item: Any) -> bool:
    return isinstance(item, Mapping) and bool(item)


def _is_tables(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str) and bool(item) and all(map(_is_table, item))


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(item: Any) -> str:
    if isinstance(item, str):
        return _string(item)
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in item.items() if one is not None) + "}"
    if isinstance(item, Sequence):
        return "[" + ", ".join(_value(one) for one in item if one is not None) + "]"
    if isinstance(item, float):
        return _number(item)
    return json.dumps(item)


def _number(number: float) -> str:
    text = repr(number)
    return text if any(mark in text for mark in ".en") else f"{text}.0"

"""Rows of changed JSON keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.diff import Difference
from regraft.core.report.numbers import value

_MISSING = object()


@dataclass(frozen=True)
class KeyChange:
    """One key of a JSON file: what it was and what it is; None where it is not there."""

    key: str
    before: str | None
    after: str | None


def key_changes(found: Difference, before: Checkpoint, after: Checkpoint) -> list[tuple[str, list[KeyChange]]]:
    """Every key that differs, by file."""
    return [(name, list(_keys(change, before.json(name), after.json(name), ""))) for name, change in found.json.items()]


def _keys(
    patch: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], stem: str
) -> Iterator[KeyChange]:
    for key, change in patch.items():
        old, new = before.get(key, _MISSING), after.get(key, _MISSING)
        if isinstance(change, Mapping) and isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _keys(change, old, new, f"{stem}{key}.")
        else:
            yield KeyChange(f"{stem}{key}", _shown(old), _shown(new))


def _shown(item: Any) -> str | None:
    if item is _MISSING:
        return None
    if item is None or isinstance(item, bool | int | float):
        return json.dumps(item)
    return value(item)

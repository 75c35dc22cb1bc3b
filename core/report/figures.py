"""The figures of a step as rows: alone, or before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.core.report.numbers import flattened, numeric, value, words

_MOST = 120
_SIDES = ("before", "after")


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        name: in words.
        cells: its value, or before and after.
        numeric: whether the cells are numbers.
    """

    name: str
    cells: tuple[str, ...]
    numeric: bool


@dataclass(frozen=True)
class Figures:
    """The figures of a step.

    Args:
        single: those with one value.
        pairs: those with a value before and one after.
        more: how many single ones are left out.
    """

    single: tuple[Row, ...]
    pairs: tuple[Row, ...]
    more: int = 0


def figures(metrics: Mapping[str, Any]) -> Figures:
    """Rows of the metrics of a step; what is named `before` and `after` stands side by side."""
    pairs, single = paired(metrics)
    return Figures(
        tuple(_row(name, value) for name, value in list(single.items())[:_MOST]),
        tuple(_row(name, *both) for name, both in pairs.items()),
        max(0, len(single) - _MOST),
    )


def paired(metrics: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, Any]], dict[str, Any]]:
    """Leaves that come before and after, by their name without these words; and the other leaves."""
    leaves = flattened(metrics)
    sides: dict[str, dict[str, Any]] = {}
    homes: dict[str, tuple[str, str]] = {}
    for key, leaf in leaves.items():
        if (split := _side(key)) is not None:
            homes[key] = split
            sides.setdefault(split[0], {})[split[1]] = leaf
    pairs = {name: (both["before"], both["after"]) for name, both in sides.items() if len(both) == len(_SIDES)}
    return pairs, {key: leaf for key, leaf in leaves.items() if key not in homes or homes[key][0] not in pairs}


def _side(key: str) -> tuple[str, str] | None:
    """`held_out.before.loss` and `held_out.loss_before` are both (`held_out.loss`, `before`)."""
    parts = key.split(".")
    for at, part in enumerate(parts):
        for side in _SIDES:
            if part == side:
                return ".".join([*parts[:at], *parts[at + 1 :]]) or "value", side
            if part.endswith(f"_{side}"):
                return ".".join([*parts[:at], part.removesuffix(f"_{side}"), *parts[at + 1 :]]), side
    return None


def _row(name: str, *values: Any) -> Row:
    return Row(words(name), tuple(value(item) for item in values), all(map(numeric, values)))

"""Rows of a data file with the place where they stand, and the account of those that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from regraft.core.errors import InputError

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: the file as the user named it, and its line or row, counted from 1."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        """`data.jsonl:12`, or `data.parquet: row 12`."""
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}: {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: column name to value."""

    values: Mapping[str, Any]
    place: Place


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    place: Place
    reason: str

    def __str__(self) -> str:
        """The place and the reason."""
        return f"{self.place}: {self.reason}"


@dataclass
class BadRows:
    """Counts the rows that cannot be used; one more than `limit` ends the reading.

    Args:
        limit: how many are skipped.
        rows: those skipped so far.
    """

    limit: int = 0
    rows: list[BadRow] = field(default_factory=list)

    def add(self, place: Place, reason: str | InputError) -> None:
        """Skip a row.

        Raises:
            InputError: more rows are bad than allowed.
        """
        text = reason if isinstance(reason, str) else _sentence(reason)
        self.rows.append(BadRow(place, text))
        if len(self.rows) > self.limit:
            self._refuse()

    def _refuse(self) -> NoReturn:
        last = self.rows[-1]
        remedy = "correct the row, or raise max_bad_rows"
        if self.limit == 0:
            raise InputError(f"this row cannot be used: {last.reason}", where=last.place, remedy=remedy)
        shown = "; ".join(str(row) for row in self.rows[:_SHOWN])
        raise InputError(
            "more rows cannot be used than max_bad_rows allows",
            where=last.place,
            expected=f"at most {self.limit}",
            found=shown + ("; ..." if len(self.rows) > _SHOWN else ""),
            remedy=remedy,
        )


def _sentence(error: InputError) -> str:
    expected = f", expected {error.expected}" if error.expected else ""
    found = f", found {error.found}" if error.found else ""
    return f"{error.message}{expected}{found}"

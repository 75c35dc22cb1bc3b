"""Time series in data files: rows such as `{"series": [1.0, 2.5, ...], "period": 12}`."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from regraft.core.data.load import files_of, read_rows
from regraft.core.data.rows import BadRows, Place, Row
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError, UsageError
from regraft.core.jsonio import brief

COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"series": ("series", "target", "values"), "period": ("period",)}
)
"""Names of a column by its role, in small letters; other columns are not read."""


@dataclass(frozen=True)
class Series:
    """Values at equal distances in time.

    Args:
        values: [T] finite, not all the same.
        period: values of a season; None where the row does not say.
        place: where it stands.
    """

    values: array[float]
    period: int | None
    place: Place


def read_series(settings: DataSettings, *, least: int, why: str) -> tuple[list[Series], BadRows]:
    """The series of data files, and the rows that were skipped.

    Args:
        settings: `source`, `columns` with the roles of `COLUMNS`, and `max_bad_rows`.
        least: values that a series must have.
        why: what they are, for messages.

    Raises:
        InputError: a file cannot be read, too many rows are no series, or none is left.
        UsageError: no column fits.
    """
    if unknown := sorted(set(settings.columns) - set(COLUMNS)):
        raise UsageError("no such role of a column", where="columns", expected=", ".join(COLUMNS), found=unknown[0])
    bad, found = BadRows(settings.max_bad_rows), []
    for source in settings.sources:
        for row in read_rows(source, settings, bad):
            column = _column(row, "series", settings.columns)
            try:
                values = _values(row.values[str(column)], str(column))
                if len(values) < least:
                    raise InputError(f"{column} is too short", expected=f"{least} values ({why})", found=len(values))
                found.append(Series(values, _period(row, settings.columns), row.place))
            except InputError as error:
                bad.add(row.place, error)
    if not found:
        raise InputError(
            "the data has no series", where=", ".join(settings.sources), expected='rows such as {"series": [1.0, 2.5]}',
            remedy="give a file with one series a line",
        )  # fmt: skip
    return found, bad


def check_series(sources: tuple[str, ...]) -> None:
    """Whether the data is there; reads none of it.

    Raises:
        UsageError: a path that leads nowhere.
    """
    for source in sources:
        files_of(source)


def _column(row: Row, role: str, given: Mapping[str, str]) -> str | None:
    """The column of a role; None for a role that need not be there."""
    if role in given:
        names = [name for name in row.values if name == given[role]]
        wanted = given[role]
    else:
        names = [name for name in row.values if name.lower() in COLUMNS[role]]
        wanted = " or ".join(COLUMNS[role])
    if len(names) > 1 or (not names and (role in given or role == "series")):
        raise UsageError(
            f"several columns may be the {role}" if names else f"no column is the {role}", where=row.place,
            expected=f"a column {wanted}", found=brief(", ".join(names or row.values)),
            remedy=f'name it: columns = {{ {role} = "..." }} in a recipe, column=... in a task of eval',
        )  # fmt: skip
    return names[0] if names else None


def _values(value: Any, column: str) -> array[float]:
    if not isinstance(value, list):
        raise InputError(f"{column} is no list of numbers", found=brief(value))
    if len(value) < 2:
        raise InputError(f"{column} has one value, and no other to forecast" if value else f"{column} is empty")
    for number, one in enumerate(value):
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise InputError(f"{column}[{number}] is no number", found=brief(one))
        if not -sys.float_info.max <= one <= sys.float_info.max:  # nor is NaN, or a whole number beyond
            raise InputError(
                f"{column}[{number}] is not finite: fill the gap, or cut the series there", found=brief(one)
            )
    values = array("d", value)
    if min(values) == max(values):
        raise InputError(f"{column} is constant: there is nothing to forecast", found=f"{values[0]:g} everywhere")
    return values


def _period(row: Row, given: Mapping[str, str]) -> int | None:
    column = _column(row, "period", given)
    value = None if column is None else row.values[column]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{column} is no period", expected="a whole number from 1", found=brief(value))
    return value

"""The geometry of a heat map: rectangles, classes and words. A template draws them, a style sheet colours them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from regraft.core.report.numbers import number

CLASSES = 7
"""Steps of the ramp of colours, `h0` to `h6`."""

_WIDEST, _NARROWEST, _ROOM = 36, 11, 900
_CELL_HEIGHT, _LABEL_HEIGHT = 20, 18
_CHARACTER_WIDTH = 7.0
_EVERY_LABEL = 18
"""From this width of a column on, each has its number."""
_LEAST_RATIO = 2.0
"""Of the ends of a logarithmic scale, so that noise among equals is not drawn as a pattern."""
_MOST_DIGITS = 6


@dataclass(frozen=True)
class Cell:
    """What stands in one place.

    Args:
        text: in the table beside the picture, and in the words of the cell.
        value: decides the colour; None where `css` does.
        css: class of a cell without a value.
        glyph: a sign in the cell, so that it is not told by colour alone.
        mark: whether it is chosen, and has a frame.
    """

    text: str
    value: float | None = None
    css: str = ""
    glyph: str = ""
    mark: bool = False


@dataclass(frozen=True)
class Rectangle:
    """A drawn cell, in pixels."""

    x: float
    y: float
    css: str
    title: str
    glyph: str = ""
    mark: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A heat map as a template draws it.

    Args:
        title: what it shows.
        row_name, column_name: what rows and columns are.
        cell_width, cell_height: of every cell.
        label_width: of the names beside the rows.
        width, height: of the cells with the numbers above them.
        top: height of those numbers.
        rows: their names, and where each is written.
        columns: their names, and where each is written; empty where there is no room.
        rectangles: the cells.
        legend: class, sign and words of every kind of cell that occurs.
        table: for each row its texts, for the table beside the picture.
        heads: of the columns of that table.
    """

    title: str
    row_name: str
    column_name: str
    cell_width: float
    cell_height: float
    label_width: float
    width: float
    height: float
    top: float
    rows: Sequence[tuple[str, float]]
    columns: Sequence[tuple[str, float]]
    rectangles: Sequence[Rectangle]
    legend: Sequence[tuple[str, str, str]]
    table: Sequence[tuple[str, Sequence[str]]]
    heads: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Scale:
    """Classes of equal width between the least and the greatest value, of their logarithms where `log`."""

    edges: tuple[float, ...]
    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float], *, log: bool) -> Scale | None:
        """The scale of the finite values, with `log` of those greater than zero; None without any."""
        fit = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        if not fit:
            return None
        low, high = min(fit), max(fit)
        if log:
            low = min(low, high / _LEAST_RATIO)
        if high == low:
            return cls((), low, high)
        steps = [step / CLASSES for step in range(1, CLASSES)]
        if log:
            return cls(tuple(low * (high / low) ** step for step in steps), low, high)
        return cls(tuple(low + (high - low) * step for step in steps), low, high)

    def css(self, value: float) -> str:
        """Class of a value; one class for everything stands in the middle of the ramp."""
        return f"h{bisect_left(self.edges, value) if self.edges else CLASSES // 2}"

    def legend(self) -> list[tuple[str, str, str]]:
        """Class and range of every step."""
        if not self.edges:
            return [(self.css(self.low), "", number(self.low))]
        bounds = [self.low, *self.edges, self.high]
        texts = _apart(bounds)
        return [(f"h{step}", "", f"{low} to {high}") for step, (low, high) in enumerate(pairwise(texts))]


def heat_map(
    cells: Mapping[tuple[str, int], Cell],
    *,
    title: str,
    rows: Sequence[str],
    columns: int,
    row_name: str,
    column_name: str,
    log: bool,
    kinds: Mapping[str, str] | None = None,
) -> HeatMap:
    """Lay out a heat map.

    Args:
        cells: by row and column; what is missing stays empty.
        title: what it shows.
        rows: from top to bottom.
        columns: how many; they are numbered from 0.
        row_name, column_name: what rows and columns are.
        log: whether colours follow the logarithm.
        kinds: words of the legend for classes of cells without a value.
    """
    width = max(_NARROWEST, min(_WIDEST, _ROOM // max(1, columns)))
    every = 1 if width >= _EVERY_LABEL else 5 if columns <= 60 else 10
    label_width = round(_CHARACTER_WIDTH * max(map(len, [*rows, row_name]), default=0)) + 10
    scale = Scale.over((cell.value for cell in cells.values() if cell.value is not None), log=log)
    top = _LABEL_HEIGHT
    places = {row: top + at * _CELL_HEIGHT for at, row in enumerate(rows)}
    rectangles = [
        Rectangle(column * width, places[row], _css(cell, scale), f"{row}, {column_name} {column}: {cell.text}",
                  cell.glyph, cell.mark)
        for (row, column), cell in sorted(cells.items(), key=lambda item: (places[item[0][0]], item[0][1]))
    ]  # fmt: skip
    return HeatMap(
        title, row_name, column_name, width, _CELL_HEIGHT, label_width, columns * width + 1,
        top + len(rows) * _CELL_HEIGHT + 1, top,
        [(row, places[row] + _CELL_HEIGHT / 2) for row in rows],
        [(str(column), (column + 0.5) * width) for column in range(0, columns, every)],
        rectangles,
        [*(scale.legend() if scale else ()), *_kinds(cells.values(), kinds or {}), *_marks(cells.values())],
        [(row, [cells[row, at].text if (row, at) in cells else "" for at in range(columns)]) for row in rows],
        [str(column) for column in range(columns)],
    )  # fmt: skip


def _apart(bounds: Sequence[float]) -> list[str]:
    """Numbers with as few digits as tell them apart."""
    for digits in range(2, _MOST_DIGITS + 1):
        texts = [f"{bound:.{digits}g}" for bound in bounds]
        if len(set(texts)) == len(texts):
            break
    return texts


def _css(cell: Cell, scale: Scale | None) -> str:
    if cell.value is None or scale is None:
        return cell.css
    return scale.css(cell.value)


def _kinds(cells: Collection[Cell], kinds: Mapping[str, str]) -> list[tuple[str, str, str]]:
    present = {cell.css: cell.glyph for cell in cells if cell.value is None}
    return [(css, present[css], label) for css, label in kinds.items() if css in present]


def _marks(cells: Collection[Cell]) -> list[tuple[str, str, str]]:
    return [("k-mark", "", "chosen")] if any(cell.mark for cell in cells) else []

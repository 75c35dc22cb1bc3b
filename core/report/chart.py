"""The geometry of a line chart, and of an interval beside zero. A template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regraft.core.report.numbers import number

WIDTH, HEIGHT = 600, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 20, 12, 40
_MOST_POINTS = 1200
"""Of a line; beyond it neighbours are averaged."""
_MOST_ROWS = 40
"""Of the table beside a chart."""
_LEAST_SPAN = 1e-8
"""Of an axis, over the size of its numbers: what floats still tell apart."""
_LARGEST = 1e300
"""Beyond it the span of an axis is no float any more."""
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class LineChart:
    """A line, dots beside it, and axes, in pixels of a 600 by 240 picture.

    Args:
        title: what it shows.
        x, y: what the axes are.
        line: the corners of the line, as SVG wants them.
        dots: points of a second series: place, and words.
        x_ticks, y_ticks: place and number.
        note: what the picture leaves out.
        table: rows of x and y, at most a few dozen.
    """

    title: str
    x: str
    y: str
    line: str
    dots: Sequence[tuple[float, float, str]]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    note: str
    table: Sequence[tuple[str, str]]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def line_chart(
    points: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float, str]] = (), *, title: str, x: str, y: str
) -> LineChart | None:
    """Lay out a line through `points`, and `dots` with their names; None without a finite point.

    Args:
        points: (x, y), x rising; those that are not finite, or beyond what an axis can span, are left out.
        dots: (x, y, name) of single points.
        title: what it shows.
        x, y: what the axes are.
    """
    whole = [point for point in points if _fits(*point)]
    if not whole:
        return None
    seen = [dot for dot in dots if _fits(*dot[:2])]
    kept, each = _thinned(whole)
    note = f"each point is the mean of {each} steps" if each > 1 else ""
    x_ticks = ticks(*_bounds([one[0] for one in whole] + [one[0] for one in seen]), whole=True)
    y_ticks = ticks(*_bounds([one[1] for one in kept] + [one[1] for one in seen]))
    across, up = _Axis(x_ticks, _LEFT, WIDTH - _RIGHT), _Axis(y_ticks, HEIGHT - _BOTTOM, _TOP)
    return LineChart(
        title, x, y, " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in kept),
        [(round(across(a), 1), round(up(b), 1), f"{name}: {number(b)}") for a, b, name in seen],
        [(round(across(tick), 1), f"{tick:,.10g}") for tick in x_ticks],
        [(round(up(tick), 1), f"{tick:.6g}") for tick in y_ticks],
        note, [(f"{a:,.10g}", number(b)) for a, b in _some(whole)],
    )  # fmt: skip


@dataclass(frozen=True)
class _Axis:
    ticks: Sequence[float]
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def _fits(*place: float) -> bool:
    return all(abs(number) <= _LARGEST for number in place)


def ticks(low: float, high: float, *, whole: bool = False, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about so many of them."""
    size = max(abs(low), abs(high))
    span = max(high - low, _LEAST_SPAN * size) if high > low else size or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(nice * power for nice in _NICE if nice * power >= span / about * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{at * step:.12g}") for at in range(first, max(last, first + 1) + 1)]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    each = math.ceil(len(points) / _MOST_POINTS)
    if each == 1:
        return list(points), 1
    groups = [points[at : at + each] for at in range(0, len(points), each)]
    return [(group[-1][0], math.fsum(point[1] for point in group) / len(group)) for group in groups], each


def _some(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The first, the last, and points between at equal distances."""
    if len(points) <= _MOST_ROWS:
        return list(points)
    places = sorted({round(at * (len(points) - 1) / (_MOST_ROWS - 1)) for at in range(_MOST_ROWS)})
    return [points[place] for place in places]


@dataclass(frozen=True)
class Interval:
    """An interval beside zero, in pixels of a 120 by 16 picture."""

    low: float
    high: float
    value: float
    words: str


def interval(value: float, low: float | None, high: float | None) -> Interval | None:
    """Lay out a 95% interval symmetrically about zero; None where it is not known."""
    if low is None or high is None or not all(map(math.isfinite, (value, low, high))):
        return None
    reach = max(abs(low), abs(high), abs(value)) or 1.0

    def place(at: float) -> float:
        return round(60 + at / reach * 54, 1)

    clear = "no clear difference" if low <= 0 <= high else "higher" if low > 0 else "lower"
    return Interval(place(low), place(high), place(value), clear)

"""The outcome of an evaluation as a table, as JSON and as plots."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.errors import ResourceError
from regraft.core.evaluate.evaluate import Outcome
from regraft.core.evaluate.metric import Curve, Fan, Grid
from regraft.core.evaluate.sample import Comparison, Estimate

_OUTSIDE_NAMES = re.compile(r"[^A-Za-z0-9]+")


def rows_of(outcomes: Sequence[Outcome], *, against: bool) -> list[tuple[str, ...]]:
    """Heading and a row for each figure: value and interval, and with a base its value and the difference."""
    heading = ("task", "figure", "value", "95% interval")
    rows: list[tuple[str, ...]] = [(*heading, "base", "difference", "95% interval") if against else heading]
    for outcome in outcomes:
        for name, figure in outcome.figures.items():
            rows.append((outcome.task.id, name, *_cells(figure, against=against)))
    return rows


def _cells(figure: Comparison, *, against: bool) -> tuple[str, ...]:
    own = (_number(figure.model.value), _interval(figure.model))
    if not against:
        return own
    if figure.base is None or figure.difference is None:
        return (*own, "-", "-", "-")
    return (*own, _number(figure.base.value), _number(figure.difference.value, "+"), _interval(figure.difference, "+"))


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:{sign}.4g}"


def _interval(estimate: Estimate, sign: str = "") -> str:
    if estimate.low is None or estimate.high is None:
        return "-"
    return f"{_number(estimate.low, sign)} .. {_number(estimate.high, sign)}"


def document(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A JSON object for each task."""
    return [
        {
            "task": outcome.task.id,
            "metric": outcome.task.metric.name,
            "settings": outcome.task.params.model_dump(mode="json"),
            "measured": dict(outcome.measured.facts),
            "figures": {name: figure.as_json() for name, figure in outcome.figures.items()},
            "notes": list(outcome.measured.notes),
        }
        for outcome in outcomes
    ]


def write_plots(folder: Path, outcomes: Sequence[Outcome]) -> list[Path]:
    """A PNG for each curve, grid and fan of the tasks, made in `folder`, which is made where it is not there.

    Raises:
        ResourceError: they cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for outcome in outcomes:
            for name, png in _plots(outcome).items():
                path = folder / f"{_plain(f'{outcome.task.id} {name}')}.png"
                path.write_bytes(png)
                written.append(path)
    except OSError as error:
        raise ResourceError(
            "plots cannot be written", where=folder, found=error.strerror, remedy="name another folder"
        ) from None
    return written


def _plots(outcome: Outcome) -> Mapping[str, bytes]:
    models = {"model": outcome.measured, **({"base": outcome.base} if outcome.base is not None else {})}
    plots: dict[str, bytes] = {}
    for name in outcome.measured.curves:
        curves = {whose: one.curves[name] for whose, one in models.items() if name in one.curves}
        plots[name] = _chart(f"{outcome.task.id}: {name}", curves)
    for name in outcome.measured.grids:
        for whose, one in models.items():
            if name in one.grids:
                plots[f"{name} {whose}"] = _map(f"{outcome.task.id}: {name}, {whose}", one.grids[name])
    for name in outcome.measured.fans:
        for whose, one in models.items():
            if name in one.fans:
                plots[f"{name} {whose}"] = _forecast(f"{outcome.task.id}: {name}, {whose}", one.fans[name])
    return plots


def _chart(title: str, curves: Mapping[str, Curve]) -> bytes:
    from regraft.core.plots import line_chart

    first = next(iter(curves.values()))
    lines = {whose: (list(one.xs), [_finite(y) for y in one.ys]) for whose, one in curves.items()}
    return line_chart(lines, title=title, x=first.x, y=first.y, log_x=first.log_x)


def _map(title: str, grid: Grid) -> bytes:
    from regraft.core.plots import heat_map

    return heat_map(
        grid.values, title=title, x=grid.x, y=grid.y, x_ticks=grid.x_ticks, y_ticks=grid.y_ticks, bounds=(0.0, 1.0)
    )


def _forecast(title: str, fan: Fan) -> bytes:
    from regraft.core.plots import fan_chart

    return fan_chart(fan.history, fan.actual, fan.median, fan.bands, title=title, x="time", y="value", first=fan.first)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _plain(name: str) -> str:
    return _OUTSIDE_NAMES.sub("-", name).strip("-").lower()

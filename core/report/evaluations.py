"""Results of `regraft eval --json` as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.core.buffers import is_file, unreadable
from regraft.core.report.chart import Interval, interval
from regraft.core.report.documents import Estimated, Evaluation, Figure, read_evaluation
from regraft.core.report.numbers import number, signed
from regraft.core.report.pictures import Picture, is_png, picture

_LARGEST_PICTURE = 4_000_000


@dataclass(frozen=True)
class FigureRow:
    """One figure of one task."""

    task: str
    figure: str
    value: str
    interval: str
    base: str
    difference: str
    difference_interval: str
    drawn: Interval | None


@dataclass(frozen=True)
class EvaluationPart:
    """One result.

    Args:
        file: name of the file.
        result: what was measured.
        rows: figures.
        notes: by task.
        pictures: plots that the result names and that are there.
    """

    file: str
    result: Evaluation
    rows: Sequence[FigureRow]
    notes: Sequence[str]
    pictures: Sequence[Picture]


def evaluation_part(path: Path) -> EvaluationPart:
    """Read a result.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    result = read_evaluation(path)
    rows = [_row(task.task, name, figure) for task in result.tasks for name, figure in task.figures.items()]
    notes = [f"{task.task}: {note}" for task in result.tasks for note in task.notes]
    notes += [f"condition that failed: {condition}" for condition in result.failed]
    found = [one for name in result.plots if (one := _plot(Path(name), path)) is not None]
    return EvaluationPart(path.name, result, rows, notes, found)


def _row(task: str, name: str, figure: Figure) -> FigureRow:
    own = (task, name, number(figure.value), _interval(figure))
    if figure.base is None or figure.difference is None:
        return FigureRow(*own, "–", "–", "–", None)
    difference = figure.difference
    drawn = interval(difference.value, difference.low, difference.high)
    return FigureRow(*own, number(figure.base.value), signed(difference.value), _interval(difference, sign=True), drawn)


def _interval(estimate: Estimated, *, sign: bool = False) -> str:
    if estimate.low is None or estimate.high is None:
        return "–"
    form = signed if sign else number
    return f"{form(estimate.low)} to {form(estimate.high)}"


def _plot(named: Path, result: Path) -> Picture | None:
    """A plot, where the result says, or beside the result; PNG alone, as `--plots` writes them."""
    for path in (named, result.parent / named.name):
        if path.suffix == ".png" and is_file(path) and path.stat().st_size <= _LARGEST_PICTURE:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise unreadable(path, error) from None
            if is_png(data):
                words = path.stem.replace("-", " ")
                return picture(words, data, ".png", alt=f"{words}: a plot of the evaluation {result.name}")
    return None

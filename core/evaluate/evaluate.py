"""Tasks measured of a model, and of its base beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from regraft.core.errors import PluginError, RegraftError, UsageError
from regraft.core.evaluate.condition import BASE, Condition
from regraft.core.evaluate.metric import Contrast, Measured, Measuring
from regraft.core.evaluate.sample import Comparison, Sample, compare

if TYPE_CHECKING:
    from regraft.core.evaluate.tasks import Task
    from regraft.core.loaded import Loaded, Opened


@dataclass(frozen=True)
class Outcome:
    """What a task found.

    Args:
        task: that was measured.
        figures: by name, with intervals.
        measured: of the model.
        base: of the base, if the metric measures it alone too.
    """

    task: Task
    figures: Mapping[str, Comparison]
    measured: Measured
    base: Measured | None = None


def evaluate(
    tasks: Sequence[Task],
    model: Opened,
    base: Opened | None,
    measuring: Measuring,
) -> list[Outcome]:
    """Measure every task, of the model first and then of the base.

    Both are in memory together only where a task compares them token by token.

    Args:
        tasks: at least one.
        model: to measure.
        base: to compare with; None without one.
        measuring: seed and batch size.

    Raises:
        UsageError: a task needs a base.
        PluginError: a plugin's metric failed.
        RegraftError: as the metrics say.
    """
    together = [task for task in tasks if isinstance(task.metric, Contrast)]
    if together and base is None:
        raise UsageError(
            "this task compares with a base", where=f"--task {together[0].id}", expected="--against CHECKPOINT",
            remedy="name the base with --against",
        )  # fmt: skip
    alone = [task for task in tasks if task not in together]
    windows = {one.window for one in (model, base) if one is not None and one.window is not None}
    if len(windows) > 1:
        measuring.tell(f"the windows differ ({' and '.join(map(str, sorted(windows)))}): texts are read in the smaller")
    measuring = replace(measuring, window=min(windows, default=None))
    subject: Loaded | None = model.load()
    ours = {task.id: _measure(task, subject, measuring) for task in alone}
    theirs: dict[str, Measured] = {}
    if base is not None:
        subject = subject if together else None  # its memory is the base's
        beside = base.load()
        theirs = {task.id: _measure(task, beside, measuring) for task in alone}
        ours |= {task.id: _measure(task, subject, measuring, beside) for task in together}
    return [_outcome(task, ours[task.id], theirs.get(task.id), measuring.seed) for task in tasks]


def _measure(task: Task, subject: Loaded | None, measuring: Measuring, base: Loaded | None = None) -> Measured:
    assert subject is not None
    try:
        if base is not None and isinstance(task.metric, Contrast):
            return task.metric.contrast(subject, base, task.params, measuring)
        return task.metric.measure(subject, task.params, measuring)
    except RegraftError:
        raise
    except Exception as error:
        if type(task.metric).__module__.startswith("regraft.core."):
            raise
        raise PluginError(
            f"the metric failed: {type(error).__name__}: {error}",
            where=task.id,
            remedy="report it to the plugin's author",
        ) from error


def _outcome(task: Task, measured: Measured, base: Measured | None, seed: int) -> Outcome:
    def beside(name: str) -> Sample | None:
        return None if base is None else base.samples.get(name)

    for name, one in measured.samples.items():
        other = beside(name)
        if other is not None and one.keys and other.keys and set(one.keys).isdisjoint(other.keys):
            raise UsageError(
                "model and base were measured on different units", where=f"--task {task.id}",
                expected="such as the same horizon and period", found=f"{one.keys[0]}, and {other.keys[0]} of the base",
                remedy="name in the task what they were made for differently",
            )  # fmt: skip
    figures = {name: compare(one, beside(name), seed=seed) for name, one in measured.samples.items()}
    return Outcome(task, figures, measured, base)


def check_conditions(conditions: Sequence[Condition], tasks: Sequence[Task], *, against: bool) -> None:
    """Refuse, before anything is measured, conditions on figures that will not be there.

    Raises:
        UsageError: no such figure, or one of a base that there is not.
    """
    if any(not task.metric.figures for task in tasks):  # only the measurement tells
        return
    named = {task.id: list(task.metric.figures) for task in tasks}
    alone = {task.id: list(task.metric.figures) for task in tasks if against and not isinstance(task.metric, Contrast)}
    known = {**_names(named, ""), **_names(alone, f"{BASE}.")}
    for condition in conditions:
        _found(condition, known, against=against)


def failed(conditions: Sequence[Condition], outcomes: Sequence[Outcome], *, against: bool) -> list[Condition]:
    """The conditions that hold.

    Raises:
        UsageError: a condition names a figure that was not measured.
    """
    own = {one.task.id: {name: it.model.value for name, it in one.figures.items()} for one in outcomes}
    bases = {
        one.task.id: {name: it.base.value for name, it in one.figures.items() if it.base is not None}
        for one in outcomes
    }
    values: dict[str, float] = {}
    known = {**_names(own, ""), **_names(bases, f"{BASE}.")}
    for prefix, table in (("", own), (f"{BASE}.", bases)):
        for task, figures in table.items():
            values |= {f"{prefix}{task}.{name}": value for name, value in figures.items()}
    found = [(one, _found(one, known, against=against)) for one in conditions]
    return [one for one, full in found if one.holds({name: values[full[name]] for name in one.names})]


def _names(figures: Mapping[str, Sequence[str] | Mapping[str, float]], prefix: str) -> dict[str, list[str]]:
    """Full names by what a condition may call them: `task.figure`, and `figure` alone."""
    known: dict[str, list[str]] = {}
    for task, names in figures.items():
        for name in names:
            full = f"{prefix}{task}.{name}"
            known.setdefault(full, []).append(full)
            known.setdefault(f"{prefix}{name}", []).append(full)
    return known


def _found(condition: Condition, known: Mapping[str, Sequence[str]], *, against: bool) -> dict[str, str]:
    """The full name of each figure of a condition."""
    for name in sorted(condition.names):
        options = known.get(name, ())
        if len(options) == 1:
            continue
        if name.startswith(f"{BASE}.") and not against:
            raise UsageError(
                "the condition names a base, and there is none", where=f"--fail-if {condition.text!r}",
                expected="--against CHECKPOINT", remedy="name the base with --against",
            )  # fmt: skip
        raise UsageError(
            "several tasks have this figure" if options else "there is no such figure",
            where=f"--fail-if {condition.text!r}",
            expected=", ".join(options or sorted({full for some in known.values() for full in some})),
            found=name,
            remedy="name the task before it, such as passkey.told" if options else "name one of these",
        )
    return {name: known[name][0] for name in condition.names}

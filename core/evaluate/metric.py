"""The contract of a metric: what `regraft eval --task` can measure. Light: no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from regraft.core.evaluate.sample import Sample

if TYPE_CHECKING:
    from regraft.core.loaded import Loaded

P = TypeVar("P", bound=BaseModel)


def _silent(message: str) -> None:
    del message


@dataclass(frozen=True)
class Measuring:
    """What a metric is handed while it measures.

    Args:
        seed: of whatever it draws; the same for a model and its base.
        batch_size: sequences of a forward pass.
        window: tokens that a text is read in where its task does not say: what both model and base are meant for.
        tell: shows a line of progress to the user.
    """

    seed: int = 0
    batch_size: int = 8
    window: int | None = None
    tell: Callable[[str], None] = field(default=_silent, compare=False)


@dataclass(frozen=True)
class Curve:
    """Points of a line: drawn for the model, and for its base beside it."""

    xs: Sequence[float]
    ys: Sequence[float]
    x: str
    y: str
    log_x: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of numbers between 0 and 1 that becomes a heat map, one for each model.

    Args:
        values: [rows, columns].
        x, y: what columns and rows are.
        x_ticks, y_ticks: their names.
    """

    values: Sequence[Sequence[float]]
    x: str
    y: str
    x_ticks: Sequence[str]
    y_ticks: Sequence[str]


@dataclass(frozen=True)
class Fan:
    """A forecast of H values beside what came, one plot for each model.

    Args:
        first: number of the first value shown.
        history: values before the forecast.
        actual, median: [H].
        bands: lower and upper ends [H] of central intervals, by their level.
    """

    first: int
    history: Sequence[float]
    actual: Sequence[float]
    median: Sequence[float]
    bands: Mapping[float, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Measured:
    """What a metric found.

    Args:
        samples: by the name of the figure.
        facts: what was measured on, such as numbers of tokens, for `--json`; JSON values.
        notes: what a reader of the figures should know, for people.
        curves, grids, fans: for `--plots`, by name.
    """

    samples: Mapping[str, Sample]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    fans: Mapping[str, Fan] = field(default_factory=dict)


class Metric(ABC, Generic[P]):
    """Something that is measured of a model; `--task NAME` asks for it.

    A task may follow the name with a colon and what is measured on, which becomes the parameter `data`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    figures: ClassVar[Mapping[str, str]]
    """Name and meaning of each figure; empty where only the measurement tells."""
    against: ClassVar[bool] = False
    """Whether it compares a model with its base, so that it needs `--against`; then `contrast` measures."""
    Params: type[P]

    def check(self, params: P) -> None:
        """Refuse, before any model is loaded, what cannot be measured.

        Raises:
            UsageError, InputError: with what is wrong with the data.
        """

    @abstractmethod
    def measure(self, subject: Loaded, params: P, measuring: Measuring) -> Measured:
        """Measure one model.

        Raises:
            RegraftError: it cannot be done.
        """


class Contrast(Metric[P]):
    """A metric of two models together."""

    against = True

    def measure(self, subject: Loaded, params: P, measuring: Measuring) -> Measured:
        """Never asked for: one model alone has no such figure."""
        raise NotImplementedError

    @abstractmethod
    def contrast(self, subject: Loaded, base: Loaded, params: P, measuring: Measuring) -> Measured:
        """Measure a model against its base.

        Raises:
            RegraftError: it cannot be done.
        """


AnyMetric = Metric[Any]


def fault_of(kind: object) -> str:
    """Why `kind` is not a class that `--task` can name; empty if it is."""
    if not isinstance(kind, type) or not issubclass(kind, Metric):
        return "is not a subclass of Metric"
    missing = [name for name in ("name", "summary", "figures", "Params") if not hasattr(kind, name)]
    if missing:
        return f"has no {', '.join(missing)}"
    if not isinstance(kind.name, str) or not issubclass(kind.Params, BaseModel):
        return "needs a name that is a string, and Params that are a pydantic model"
    if abstract := sorted(kind.__abstractmethods__):
        return f"does not define {', '.join(abstract)}"
    return ""

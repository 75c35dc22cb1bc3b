"""Forecasts of time series: sample paths against what came, and against the seasonal naive forecast.

A model that can be asked has `forecast(values, horizon, samples, generator)`, values [batch, time] to paths [batch,
samples, horizon]; or `forecast(values, horizon)` to single forecasts [batch, horizon]. `time_series` of its config may
name `context`, `horizon` and `period`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from regraft.core.data.series import Series, check_series, read_series
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.evaluate.metric import Curve, Fan, Measured, Measuring, Metric
from regraft.core.evaluate.sample import Sample, compare
from regraft.core.jsonio import brief
from regraft.core.transformation import Params

if TYPE_CHECKING:
    from regraft.core.loaded import Loaded
    from regraft.core.measures.forecasts import Values

Count = Annotated[int, Field(ge=1)]

_LEAST_PATHS = 2
_SHOWN_HISTORY = 4
"""Horizons of the past that a plot shows."""


class ForecastParams(Params):
    """Series whose last values are forecast."""

    data: tuple[str, ...] = Field(
        description='Data files with rows such as {"series": [1.0, 2.5], "period": 12}, with commas between them.'
    )
    column: str | None = Field(None, description="The column with the series. Default: series, target or values.")
    horizon: Count | None = Field(None, description="Values of a forecast. Default: what the model was made for.")
    period: Count | None = Field(
        None, description="Values of a season. Default: what the row says, else the model's config, else 1."
    )
    samples: Annotated[int, Field(ge=_LEAST_PATHS)] = Field(100, description="Paths of a forecast.")
    origins: Count = Field(1, description="Forecasts of each series; the last one ends with the series.")
    step: Count | None = Field(
        None, description="Values from where a forecast begins to where the next does. Default: the horizon."
    )
    max_series: Count | None = Field(None, description="Only the first so many series.")
    max_bad_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="Rows that may be left out because they are no series, or too short."
    )
    plots: Annotated[int, Field(ge=0)] = Field(4, description="Forecasts that --plots draws.")


@dataclass(frozen=True)
class Cut:
    """One forecast to make.

    Args:
        key: its name; the same for models that are asked the same.
        history: [T] all values before.
        actual: [H] values that came.
        period: m.
    """

    key: str
    history: Values
    actual: Values
    period: int


class Forecast(Metric[ForecastParams]):
    """Sample paths behind the history of each series, scored by what came."""

    name = "forecast"
    summary = "Forecasts of time series, for a model whose code has `forecast`, such as fourier-head's."
    figures = MappingProxyType(
        {
            "crps": "CRPS over the in-sample error of the seasonal naive forecast; of single forecasts, MASE; lower is "
            "better",
            "wql": "weighted quantile loss at 0.1, ..., 0.9: over the sum of absolute values; lower is better",
            "mase": "absolute error of the median over the in-sample error of the seasonal naive forecast; lower is "
            "better",
            "naive_crps": "crps of the seasonal naive forecast, with normal errors",
            "naive_mase": "mase of the seasonal naive forecast",
            "coverage_50": "share of values in the central 50% interval",
            "coverage_80": "share of values in the central 80% interval",
            "coverage_95": "share of values in the central 95% interval",
        }
    )
    Params = ForecastParams

    def check(self, params: ForecastParams) -> None:
        """Whether the data is there."""
        check_series(params.data)

    def measure(self, subject: Loaded, params: ForecastParams, measuring: Measuring) -> Measured:
        """One forecast at a time, all its paths together.

        Raises:
            Unsupported: the model makes no forecasts, or not of this length.
            InputError: a row is no series, or too short.
        """
        settings = _settings(subject)
        cuts, skipped = _cuts(subject, params, settings)
        measuring.tell(f"forecast: {len(cuts)} forecasts of {len(cuts[0].actual)} values")
        scores = [_Scores.of(cut, _paths(subject, cut, params, measuring, number)) for number, cut in enumerate(cuts)]
        samples = _samples(scores)
        notes = [f"{skipped} rows are left out"] if skipped else []
        notes.append(_beside(samples, measuring.seed))
        facts = {"forecasts": len(cuts), "horizon": len(cuts[0].actual), "samples": len(scores[0].paths),
                 "periods": sorted({cut.period for cut in cuts}), "skipped_rows": skipped,
                 "crps_in_units_of_the_data": _mean([float(one.crps.mean()) for one in scores])}  # fmt: skip
        fans = {f"forecast {number + 1}": _fan(one) for number, one in enumerate(scores[: params.plots])}
        return Measured(samples, facts, notes, _curves(scores), fans=fans)


def _settings(subject: Loaded) -> Mapping[str, Any]:
    """What the checkpoint says of its forecasts."""
    if not callable(getattr(subject.model, "forecast", None)):
        raise Unsupported(
            "the model makes no forecasts", where=subject.checkpoint.label,
            expected="a model whose code has `forecast`", found=type(subject.model).__name__,
            remedy="make one with `fourier-head` and `series`, and give --trust-remote-code",
        )  # fmt: skip
    found: Mapping[str, Any] = subject.checkpoint.config.get("time_series", {})
    counts = {key: found.get(key, 1) for key in ("context", "horizon", "period")} if isinstance(found, Mapping) else {}
    if not counts or any(type(value) is not int or value < 1 for value in counts.values()):
        raise InputError(
            "does not say what forecasts the model makes", where=f"{subject.checkpoint.label}: time_series",
            expected="context, horizon and period, whole numbers from 1", found=brief(found),
            remedy="restore the file as it was written",
        )  # fmt: skip
    return found


def _cuts(subject: Loaded, params: ForecastParams, settings: Mapping[str, Any]) -> tuple[list[Cut], int]:
    """The forecasts to make, and how many rows are left out."""
    horizon = params.horizon or settings.get("horizon")
    if horizon is None:
        raise UsageError("the model's config names no horizon", where=subject.checkpoint.label,
                         remedy='give one, such as --task "forecast:series.jsonl horizon=12"')  # fmt: skip
    step = params.step or horizon
    if "context" in settings:
        _check_window(subject, settings["context"], horizon)
    known = {"series": params.column} if params.column is not None else {}
    reading = DataSettings(source=params.data, columns=known, max_bad_rows=params.max_bad_rows)
    period = params.period or settings.get("period", 1)
    needed = horizon + (params.origins - 1) * step
    why = f"{horizon} to forecast, {needed - horizon} for more origins, "
    series, bad = read_series(reading, least=needed + period + 1, why=why + f"{period + 1} before them")
    found = list[Cut]()
    for one in series[: params.max_series]:
        own = params.period or one.period or period
        found += [_cut(one, horizon, origin * step, own) for origin in reversed(range(params.origins))]
    return found, len(bad.rows)


def _check_window(subject: Loaded, context: int, horizon: int) -> None:
    if subject.window is not None and context + horizon > subject.window:
        raise Unsupported(
            "the model has no positions for so long a forecast", where=subject.checkpoint.label,
            expected=f"horizon at most {subject.window - context}", found=horizon, remedy="lower horizon",
        )  # fmt: skip


def _cut(series: Series, horizon: int, behind: int, period: int) -> Cut:
    import numpy

    values = numpy.array(series.values)
    stop = len(values) - behind
    history, actual = values[: stop - horizon], values[stop - horizon : stop]
    where = f"{series.place}, before value {len(history) + 1}"
    if len(history) <= period:
        raise InputError(
            "the series is shorter than a season", where=where, expected=f"more than {period} values",
            found=len(history), remedy="give period=, or longer series",
        )  # fmt: skip
    if not (history[period:] != history[:-period]).any():
        raise InputError(
            "the series repeats itself exactly, so that the seasonal naive forecast has no error to measure by",
            where=where, found=f"period {period}", remedy="leave the series out, or give another period=",
        )  # fmt: skip
    return Cut(f"{series.place}@{len(history)}+{horizon}/{period}", history, actual, period)


def _paths(subject: Loaded, cut: Cut, params: ForecastParams, measuring: Measuring, number: int) -> Values:
    """[K, H]; K = 1 of a model that does not draw."""
    import numpy
    import torch

    from regraft.core.training.model import memory

    forecast, horizon = subject.model.forecast, len(cut.actual)
    options = dict[str, Any]()
    if "samples" in inspect.signature(forecast).parameters:
        seed = Random(f"{measuring.seed}/{number}").getrandbits(63)
        options = {"samples": params.samples, "generator": torch.Generator().manual_seed(seed)}
    try:
        with torch.no_grad(), memory("forecasting"):
            found = forecast(torch.tensor(cut.history)[None], horizon, **options)
    except ValueError as error:
        raise Unsupported("the model cannot forecast this", where=cut.key, found=error,
                          remedy="see the code in the checkpoint") from None  # fmt: skip
    if tuple(found.shape) not in ((1, horizon), (1, params.samples, horizon)):
        raise Unsupported(
            "the model's code gives forecasts of another shape", where=subject.checkpoint.label,
            expected=f"[1, {params.samples}, {horizon}] or [1, {horizon}]", found=list(found.shape),
            remedy="see the code in the checkpoint",
        )  # fmt: skip
    paths: Values = numpy.asarray(found.double().cpu()).reshape(-1, horizon)
    if not numpy.isfinite(paths).all():
        raise InputError("the model's forecast is not finite", where=f"{subject.checkpoint.label}, {cut.key}")
    return paths


@dataclass(frozen=True)
class _Scores:
    """What became of a forecast; arrays are [H]."""

    cut: Cut
    paths: Values
    unit: float
    crps: Values
    loss: Values
    error: Values
    naive: Values
    naive_crps: Values
    inside: Mapping[float, Values]

    @classmethod
    def of(cls, cut: Cut, paths: Values) -> _Scores:
        """Score the paths, and the seasonal naive forecast."""
        import numpy

        from regraft.core.measures import forecasts as measure

        horizon = len(cut.actual)
        middle = measure.quantiles(paths, [0.5])[0]
        naive = measure.seasonal_naive(cut.history, horizon, cut.period)
        spread = measure.naive_deviation(cut.history, horizon, cut.period)
        levels = measure.LEVELS if len(paths) > 1 else ()
        return cls(
            cut,
            paths,
            measure.naive_error(cut.history, cut.period),
            measure.crps(paths, cut.actual),
            measure.quantile_loss(measure.quantiles(paths, measure.DECILES), measure.DECILES, cut.actual),
            numpy.abs(middle - cut.actual),
            numpy.abs(naive - cut.actual),
            measure.gaussian_crps(naive, spread, cut.actual),
            {level: measure.covered(paths, cut.actual, level) for level in levels},
        )


def _samples(scores: Sequence[_Scores]) -> dict[str, Sample]:
    """The figures; a unit is a forecast."""
    keys = [one.cut.key for one in scores]

    def mean(values: Sequence[Values]) -> Sample:
        return Sample([float(one.sum()) for one in values], [float(len(one)) for one in values], keys)

    size = [float(abs(one.cut.actual).sum()) for one in scores]
    found = {
        "crps": mean([one.crps / one.unit for one in scores]),
        "wql": Sample([float(one.loss.sum()) for one in scores], size, keys),
        "mase": mean([one.error / one.unit for one in scores]),
        "naive_crps": mean([one.naive_crps / one.unit for one in scores]),
        "naive_mase": mean([one.naive / one.unit for one in scores]),
    }
    return found | {
        f"coverage_{level * 100:.0f}": mean([one.inside[level] for one in scores]) for level in scores[0].inside
    }


def _beside(samples: Mapping[str, Sample], seed: int) -> str:
    """The difference to the seasonal naive forecast, in words."""
    words = []
    for name in ("crps", "mase"):
        found = compare(samples[name], samples[f"naive_{name}"], seed=seed).difference
        assert found is not None
        interval = "" if found.low is None else f" ({found.low:+.4f} .. {found.high:+.4f})"
        words.append(f"{name} {found.value:+.4f}{interval}")
    return f"against the seasonal naive forecast: {', '.join(words)}; below 0 the model is better"


def _curves(scores: Sequence[_Scores]) -> dict[str, Curve]:
    """CRPS by how far ahead, and the coverage of every level."""
    import numpy

    from regraft.core.measures.forecasts import covered

    ahead = numpy.mean([one.crps / one.unit for one in scores], axis=0)
    curves = {"crps by step": Curve(list(range(1, len(ahead) + 1)), ahead.tolist(), "steps ahead", "crps")}
    if scores[0].inside:
        levels = [number / 20 for number in range(1, 20)]
        shares = [
            _mean([float(covered(one.paths, one.cut.actual, level).mean()) for one in scores]) for level in levels
        ]
        curves["coverage"] = Curve(levels, shares, "level of the interval", "share of values inside")
    return curves


def _fan(scores: _Scores) -> Fan:
    from regraft.core.measures.forecasts import LEVELS, quantiles

    cut = scores.cut
    history = cut.history[-_SHOWN_HISTORY * len(cut.actual) :]
    bands = {}
    for level in LEVELS if scores.inside else ():
        low, high = quantiles(scores.paths, [(1 - level) / 2, (1 + level) / 2])
        bands[level] = (low.tolist(), high.tolist())
    middle = quantiles(scores.paths, [0.5])[0].tolist()
    first = len(cut.history) - len(history)
    return Fan(first, history.tolist(), cut.actual.tolist(), middle, bands)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

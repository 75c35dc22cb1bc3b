"""How good forecasts of a time series are: scores of sample paths, and the seasonal naive forecast beside them.

Shapes: K paths, H values ahead, T values known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    Values = numpy.ndarray[Any, numpy.dtype[numpy.float64]]

LEVELS = (0.5, 0.8, 0.95)
"""Of the central intervals whose coverage is told."""

DECILES = tuple(number / 10 for number in range(1, 10))


def crps(paths: Values, actual: Values) -> Values:
    """Continuous ranked probability score of each value, [H], in the units of the data.

    E|X - y| - E|X - X'| / 2 over paths X (Gneiting & Raftery 2007, eq. 21). The second mean leaves out pairs of a path
    with itself, so that the score does not depend on K (Ferro 2014, "fair" CRPS). Of one path: its absolute error.

    Args:
        paths: [K, H].
        actual: [H].
    """
    ordered = numpy.sort(paths, axis=0)
    count = len(ordered)
    distance = numpy.abs(ordered - actual).mean(0)
    if count == 1:
        return numpy.asarray(distance)
    weights = 2 * numpy.arange(count) - count + 1  # each path minus those below it, plus those above: Σ_i<j (x_j - x_i)
    return numpy.asarray(distance - (weights[:, None] * ordered).sum(0) / (count * (count - 1)))


def gaussian_crps(mean: Values, deviation: Values, actual: Values) -> Values:
    """The same of normal distributions, in closed form; 0 deviation gives the absolute error.

    σ (z (2Φ(z) - 1) + 2φ(z) - 1/√π) with z = (y - μ) / σ (Gneiting, Raftery, Westveld & Goldman 2005, eq. 5).
    """
    gap = actual - mean
    with numpy.errstate(over="ignore"):
        z = numpy.clip(gap / numpy.maximum(deviation, 1e-300), -38, 38)  # beyond, densities are 0
    erf = numpy.array([math.erf(one / math.sqrt(2)) for one in z.ravel()]).reshape(z.shape)
    density = numpy.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return numpy.asarray(gap * erf + deviation * (2 * density - 1 / math.sqrt(math.pi)))


def quantiles(paths: Values, levels: Sequence[float]) -> Values:
    """Quantiles of paths [K, H] at each level, [levels, H].

    The k-th smallest of K draws is the quantile k / (K + 1) (Weibull; Hyndman & Fan 1996, type 6): then a further draw
    lies below it with just this probability, and intervals cover what they say even for few paths.
    """
    return numpy.asarray(numpy.quantile(paths, levels, axis=0, method="weibull"))


def quantile_loss(forecast: Values, levels: Sequence[float], actual: Values) -> Values:
    """2 max(α (y - q), (α - 1)(y - q)), mean over levels α, [H]: its mean over all levels is the CRPS.

    Over Σ|y| the weighted quantile loss (Park et al. 2022; Ansari et al., Chronos, 2024).

    Args:
        forecast: q [levels, H].
        levels: α.
        actual: y [H].
    """
    share = numpy.asarray(levels)[:, None]
    gap = actual - forecast
    return numpy.asarray(2 * numpy.maximum(share * gap, (share - 1) * gap).mean(0))


def covered(paths: Values, actual: Values, level: float) -> Values:
    """Whether each value lies in the central interval of this level, [H] of 0 and 1."""
    low, high = quantiles(paths, [(1 - level) / 2, (1 + level) / 2])
    return numpy.asarray((low <= actual) & (actual <= high), dtype=float)


def seasonal_naive(history: Values, horizon: int, period: int) -> Values:
    """The last season again and again, [H]: x_(T + h) = x_(T + h - m ⌈h / m⌉)."""
    season = history[-period:]
    return numpy.asarray(season[numpy.arange(horizon) % period])


def naive_error(history: Values, period: int) -> float:
    """Mean absolute error of the seasonal naive forecast one season ahead, in the sample: Σ|x_t - x_(t - m)| / (T - m).

    What a forecast's absolute errors are divided by to make them MASE (Hyndman & Koehler 2006, eq. 3; with seasons as
    in Hyndman & Athanasopoulos, Forecasting: Principles and Practice, §5.8).
    """
    return float(numpy.abs(history[period:] - history[:-period]).mean())


def naive_deviation(history: Values, horizon: int, period: int) -> Values:
    """Standard deviation of the seasonal naive forecast's errors, [H]: σ √⌈h / m⌉, σ² their mean square in the sample.

    As a seasonal random walk has them (Hyndman & Athanasopoulos §5.5).
    """
    error = math.sqrt(float(numpy.square(history[period:] - history[:-period]).mean()))
    return numpy.asarray(error * numpy.sqrt(numpy.arange(horizon) // period + 1))

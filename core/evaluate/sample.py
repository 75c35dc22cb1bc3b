"""Figures over units (blocks of text, questions, pairs), and their intervals by the bootstrap.

A figure is Σ totals / Σ weights over units, or e to that. Units are drawn anew with replacement (Efron 1979), and the
interval holds the middle 95% of the figures of the draws. Two models are compared on the same draws: what makes a unit
hard for both then cancels, so the interval of their difference is often far narrower than their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy

    Values = numpy.ndarray[Any, numpy.dtype[numpy.float64]]

DRAWS = 2000
"""Resamples of an interval."""

_COVERED = 0.95
_CELLS = 1 << 22
"""Counts of draws × units that are held at once."""


@dataclass(frozen=True)
class Sample:
    """What a model did on each unit.

    Args:
        totals: [N] such as nats, or 1 for a right answer.
        weights: [N] what they are divided by, such as tokens or bytes; 1 for a mean.
        keys: [N] names of the units, by which those of two models are paired; all different.
        scale: `exp` for e to the ratio.
    """

    totals: Sequence[float]
    weights: Sequence[float]
    keys: Sequence[str]
    scale: Literal["ratio", "exp"] = "ratio"

    @classmethod
    def mean(cls, values: Mapping[str, float]) -> Sample:
        """The mean of one value for each unit."""
        return cls(list(values.values()), [1.0] * len(values), list(values))

    @property
    def value(self) -> float:
        """The figure; NaN where nothing was weighed."""
        return self._scaled(_ratio(math.fsum(self.totals), math.fsum(self.weights)))

    def drawn(self, counts: Values) -> Values:
        """The figure of each draw; `counts` [D, N] tell how often each unit is in it."""
        import numpy

        with numpy.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratios = (counts @ numpy.asarray(self.totals)) / (counts @ numpy.asarray(self.weights))
            figures: Values = numpy.exp(ratios) if self.scale == "exp" else ratios
            return figures

    def aligned(self, keys: Sequence[str]) -> Sample:
        """The same units in the order of `keys`; one that is not there weighs nothing."""
        if list(keys) == list(self.keys):
            return self
        own = {key: (total, weight) for key, total, weight in zip(self.keys, self.totals, self.weights, strict=True)}
        pairs = [own.get(key, (0.0, 0.0)) for key in keys]
        return Sample([total for total, _ in pairs], [weight for _, weight in pairs], list(keys), self.scale)

    def _scaled(self, ratio: float) -> float:
        if self.scale == "ratio":
            return ratio
        try:
            return math.exp(ratio)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Args:
        value: the figure.
        low, high: 95% interval; None with fewer than two units, or where a draw is not finite.
    """

    value: float
    low: float | None
    high: float | None

    def as_json(self) -> dict[str, float | None]:
        """By name."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Comparison:
    """A figure of a model, beside that of a base if there is one.

    Args:
        units: how many were drawn from.
        model: the figure.
        base: the base's.
        difference: model minus base, on paired draws.
    """

    units: int
    model: Estimate
    base: Estimate | None = None
    difference: Estimate | None = None

    def as_json(self) -> dict[str, Any]:
        """By name."""
        facts: dict[str, Any] = {"units": self.units, **self.model.as_json()}
        if self.base is not None and self.difference is not None:
            facts |= {"base": self.base.as_json(), "difference": self.difference.as_json()}
        return facts


def compare(model: Sample, base: Sample | None = None, *, seed: int = 0, draws: int = DRAWS) -> Comparison:
    """The figure with its interval, and against the base on the same draws.

    Args:
        model: without a unit there is no figure, but NaN.
        base: of the base, on the same units.
        seed: of the draws: the same data and seed give the same intervals.
        draws: how many.
    """
    import numpy

    keys = list(dict.fromkeys([*model.keys, *(base.keys if base is not None else ())]))
    if not keys:
        nothing = Estimate(math.nan, None, None)
        return Comparison(0, nothing) if base is None else Comparison(0, nothing, nothing, nothing)
    samples = [one.aligned(keys) for one in (model, base) if one is not None]
    random, size = numpy.random.default_rng(seed), max(1, _CELLS // len(keys))
    found: list[list[Values]] = [[] for _ in samples]
    for start in range(0, draws, size):
        counts = random.multinomial(len(keys), [1 / len(keys)] * len(keys), size=min(size, draws - start))
        for values, sample in zip(found, samples, strict=True):
            values.append(sample.drawn(counts.astype(float)))
    drawn = [numpy.concatenate(values) for values in found]
    own = _estimate(samples[0].value, drawn[0], len(keys))
    if base is None:
        return Comparison(len(keys), own)
    change = _estimate(samples[0].value - samples[1].value, drawn[0] - drawn[1], len(keys))
    return Comparison(len(keys), own, _estimate(samples[1].value, drawn[1], len(keys)), change)


def _estimate(value: float, drawn: Values, units: int) -> Estimate:
    import numpy

    if units < 2 or not bool(numpy.isfinite(drawn).all()):
        return Estimate(value, None, None)
    low, high = numpy.quantile(drawn, [(1 - _COVERED) / 2, (1 + _COVERED) / 2])
    return Estimate(value, float(low), float(high))


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else math.nan

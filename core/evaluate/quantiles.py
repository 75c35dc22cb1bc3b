"""A distribution as a line: which share of the units has at most so much."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.core.evaluate.metric import Curve


def quantiles(values: Sequence[float], y: str) -> Curve:
    """The values in ascending order over the share of units."""
    ordered = sorted(values)
    return Curve([(number + 0.5) / len(ordered) for number in range(len(ordered))], ordered, "share of units", y)

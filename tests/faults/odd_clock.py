"""`python -m tests.faults.odd_clock KIND ARGUMENTS`: `regraft ARGUMENTS` under a clock that is wrong or jumps."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable

DAY = 86_400.0
JUMPS: dict[str, Callable[[int], float]] = {
    "past": lambda call: -56 * 365 * DAY,
    "future": lambda call: 100 * 365 * DAY,
    "backwards": lambda call: -call * DAY,
    "forwards": lambda call: call * DAY,
    "to and fro": lambda call: (-1) ** call * DAY,
}
"""Seconds that the clock of the day is off, by the number of the question."""
LEAP_SECONDS = 30.0
"""By which steady clocks, which never go back, leap with every question while the other goes forwards, as on a machine
that slept."""


def install(kind: str) -> None:
    """From now on the clocks that Python code asks are off."""
    numbers, steady = itertools.count(), itertools.count()
    leap = LEAP_SECONDS if kind == "forwards" else 0.0
    _replace("time", lambda: JUMPS[kind](next(numbers)))
    for name in ("monotonic", "perf_counter"):
        _replace(name, lambda: leap * next(steady))


def _replace(name: str, off: Callable[[], float]) -> None:
    seconds, nanoseconds = getattr(time, name), getattr(time, f"{name}_ns")
    setattr(time, name, lambda: max(0.0, seconds() + off()))
    setattr(time, f"{name}_ns", lambda: max(0, nanoseconds() + int(off() * 1e9)))


if __name__ == "__main__":
    install(sys.argv[1])
    from regraft.cli.main import run

    run(sys.argv[2:])

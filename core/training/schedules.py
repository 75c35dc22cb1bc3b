"""The learning rate of every step, as a share of the peak."""

from __future__ import annotations

import math
from typing import Literal


def rate_share(
    step: int,
    steps: int,
    *,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_steps: int = 0,
    final: float = 0.0,
) -> float:
    """Share of the peak rate in step `step`, counted from 0, of `steps`.

    In warmup step i it is (i + 1) / warmup_steps. Afterwards, with p = (step - warmup) / (steps - warmup) in [0, 1), it
    is 1, final + (1 - final)·(1 - p), or final + (1 - final)·½(1 + cos πp).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return final + (1 - final) * left

"""What a training leaves behind: on the disk, and as its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.core.training.progress import Listener


@dataclass(frozen=True)
class Records:
    """What a training leaves on the disk, and whom it tells.

    Args:
        state: folder of the saved state; a run that finds one goes on from it.
        identity: what else decides the result, such as the base's digest; a state with another one is refused.
        log: file of JSON lines.
        tensorboard: folder of TensorBoard events.
        listen: called after every step.
    """

    state: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    log: Path | None = None
    tensorboard: Path | None = None
    listen: Listener | None = None


@dataclass(frozen=True)
class Report:
    """What a training did.

    Args:
        losses: of every step, before its update.
        steps: done, over all sessions.
        planned: steps that the data would have given.
        tokens: seen.
        seconds: of this session.
        resumed: steps that were done before this session.
        stopped: why it ended early: `stop_loss`, or nothing.
        precision: in which it computed.
    """

    losses: tuple[float, ...]
    steps: int
    planned: int
    tokens: int
    seconds: float
    resumed: int
    stopped: str
    precision: str

    @property
    def final_loss(self) -> float:
        """Loss of the last step."""
        return self.losses[-1] if self.losses else math.nan

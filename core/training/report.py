"""What every training step reports: the loss as a plot and as numbers, and figures for the lock file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import FileRef
from regraft.core.plots import loss_curve

if TYPE_CHECKING:
    from regraft.core.training.loop import Report


def training_reports(
    report: Report, title: str, *, prefix: str = "", held_out: Mapping[int, float] | None = None
) -> dict[str, FileRef]:
    """`loss.png` and `losses.jsonl`, for `Patch.reports`.

    Args:
        report: of the training.
        title: of the plot.
        prefix: before both names, such as `stage-1-`.
        held_out: held-out losses for the plot, by the number of steps done before.
    """
    lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(report.losses, 1)]
    return {
        f"{prefix}loss.png": FileRef(data=loss_curve(report.losses, title=title, held_out=held_out)),
        f"{prefix}losses.jsonl": FileRef(data="".join(lines).encode()),
    }


def report_metrics(report: Report) -> dict[str, Any]:
    """Figures of a training for `Patch.metrics`; no times, so that two runs give the same lock file."""
    return {
        "steps": report.steps,
        "planned_steps": report.planned,
        "first_loss": report.losses[0] if report.losses else None,
        "final_loss": report.losses[-1] if report.losses else None,
        "tokens": report.tokens,
        "stopped": report.stopped or "end of the data",
        "precision": report.precision,
    }

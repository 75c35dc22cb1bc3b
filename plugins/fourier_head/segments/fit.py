"""Training of the maps on the shared loop, and how well they forecast the held-out ends of the series."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.patch import Patch
from regraft.core.plots import line_chart
from regraft.core.training.loop import Records, train
from regraft.core.training.modes import computing, resolve_precision
from regraft.core.training.progress import telling
from regraft.core.training.report import report_metrics, training_reports
from regraft.core.training.settings import TrainSettings
from regraft.core.training.trained import trained_patch
from regraft.core.training.weights import select
from regraft.core.transformation import Run
from regraft.plugins.fourier_head.segments.params import SegmentSettings
from regraft.plugins.fourier_head.segments.series import SegmentBatch, Series, Window, Windows, read_series, windows

_SHOWN_SEGMENTS = 3


@dataclass(frozen=True)
class SegmentLoss:
    """Squared error of every next segment, on the scale of the window; the unit is a number predicted."""

    model: Any

    def __call__(self, batch: SegmentBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The sum over all numbers."""
        found = self.model.next_segments(batch.segments[:, :-1], batch.stamps)
        return (found.float() - batch.segments[:, 1:]).square().sum(), {}

    def identity(self) -> Mapping[str, Any]:
        """Its name."""
        return {"name": "squared error of next segments"}


def fit(staged: Checkpoint, patch: Patch, settings: SegmentSettings, run: Run) -> Patch:
    """`patch` with trained maps, figures and reports.

    Args:
        staged: with the maps as they begin.
        patch: that made it.
        settings: of the step.
        run: the run.

    Raises:
        RegraftError: as the data is read, and as the training.
    """
    series, files = read_series(settings)
    learnt, held = windows(series, settings)
    model = run.model(staged, trust_remote_code=True)  # the code is our template's: `check` refuses any other
    digest = _digest(series)
    stamps = _stamps(model, run.tokenizer(staged), series, [*learnt, *held], settings) if settings.stamps else {}
    steps = Windows(series, learnt, settings, run.seed_for("order"), stamps, digest, run.rank, run.world)
    measured = replace(steps, windows=held, rank=0, world=1)
    objective, trainable = SegmentLoss(model), select(model, [n for n, _ in model.named_parameters() if n[:3] == "ts."])
    precision = resolve_precision(settings.precision, run.device)
    before = _measured(model, measured, precision, run.device)
    options = TrainSettings(
        lr=settings.lr, warmup_steps=settings.warmup_steps, schedule=settings.schedule, clip_norm=settings.clip_norm,
        precision=settings.precision, seed=run.seed_for("steps"),
    )  # fmt: skip
    records = Records(
        state=None if run.state is None else run.state / "segments", identity={"checkpoint": staged.digest},
        log=settings.log, tensorboard=settings.tensorboard, listen=telling(run.tell),
    )  # fmt: skip
    run.tell(f"segments: {len(learnt)} windows of {len(series)} series, {len(steps)} steps")
    report = train(model, steps, options, objective, trainable, records=records)
    learned = trained_patch(staged, model, sorted(trainable))
    data = {"series": len(series), "numbers": sum(len(one.values) for one in series), "digest": digest, "files": files}
    metrics = {
        **patch.metrics, **learned.metrics, **report_metrics(report), "data": data, "windows": len(learnt),
        "held_out_windows": len(held), "held_out_before": before,
        "held_out_after": _measured(model, measured, precision, run.device),
    }  # fmt: skip
    reports = training_reports(report, "segments: squared error")
    if held:
        reports["forecast.png"] = _plot(model, measured)
    return replace(patch, edits={**patch.edits, **learned.edits}, metrics=metrics, reports=reports)


def _digest(series: Sequence[Series]) -> str:
    found = hashlib.sha256()
    for one in series:
        found.update(f"{len(one.values)} {one.start} {one.step} ".encode() + one.values.tobytes())
    return found.hexdigest()


def _stamps(
    model: Any, tokenizer: Any, series: Sequence[Series], chosen: Sequence[Window], settings: SegmentSettings
) -> dict[tuple[int, int], torch.Tensor]:
    """An embedding for each segment of each window, by series and number of its first value."""
    from datetime import timedelta

    places = {(one.series, one.start + k * settings.length) for one in chosen for k in range(settings.count)}
    found = {}
    for number, start in sorted(places):
        one = series[number]
        assert one.start is not None
        assert one.step is not None
        first = one.start + timedelta(seconds=start * one.step)
        found[number, start] = model.stamps(tokenizer, first.isoformat(), one.step, 1)[0].cpu()
    return found


@torch.no_grad()
def _measured(model: Any, held: Windows, precision: str, device: str) -> dict[str, float]:
    """Mean squared error of the last segments, and of the guess that the segment before comes again."""
    count = len(held.windows)
    sums = {"mse": 0.0, "mse_of_repeating": 0.0}
    size = held.settings.micro_batch or held.settings.batch_size
    for start in range(0, count, size):
        batch = held.gather(range(start, min(start + size, count)), device)
        with computing(device.partition(":")[0], precision):
            found = model.next_segments(batch.segments[:, :-1], batch.stamps)[:, -1].float()
        wanted = batch.segments[:, -1]
        sums["mse"] += (found - wanted).square().mean(1).sum().item()
        sums["mse_of_repeating"] += (batch.segments[:, -2] - wanted).square().mean(1).sum().item()
    return {name: value / count for name, value in sums.items()} if count else {}


def _plot(model: Any, held: Windows) -> FileRef:
    """The end of the first held-out series, with what follows from the context before it."""
    window, settings = held.windows[0], held.settings
    values = held.series[window.series].values
    end = window.start + settings.context
    behind = min(len(values) - end, _SHOWN_SEGMENTS * settings.length)
    stamps = None
    if held.stamps:  # as far as they are known: one more segment than is seen needs no stamp of its own
        behind = min(behind, settings.length)
        stamps = torch.stack(
            [held.stamps[window.series, window.start + k * settings.length] for k in range(settings.count)]
        )
    known = list(values[window.start : end])
    found = model.forecast(torch.tensor(known, dtype=torch.float64), behind, stamps).tolist()
    places = [float(place) for place in range(window.start, end + behind)]
    series = {"series": (places, [*known, *values[end : end + behind]]), "forecast": (places[len(known) :], found)}
    return FileRef(data=line_chart(series, title="a held-out end", x="number", y="value"))

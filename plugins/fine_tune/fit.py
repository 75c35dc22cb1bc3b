"""The run: model, data, training, and the patch with what was learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Patch, overlay
from regraft.core.training.head import Head
from regraft.core.training.loop import Records, Report, train
from regraft.core.training.model import window_of
from regraft.core.training.modes import resolve_precision
from regraft.core.training.progress import telling
from regraft.core.training.report import report_metrics, training_reports
from regraft.core.training.settings import TrainOptions, TrainSettings
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.transformation import Run
from regraft.plugins.fine_tune.learning import learning, stored
from regraft.plugins.fine_tune.lesson import Lesson, Teacher
from regraft.plugins.fine_tune.params import FineTuneParams
from regraft.plugins.fine_tune.rewrite import selected
from regraft.plugins.fine_tune.target import Target, target_of


def fit(checkpoint: Checkpoint, params: FineTuneParams, run: Run) -> Patch:
    """The patch with the trained weights.

    Raises:
        RegraftError: see `FineTune.apply`.
    """
    refuse_untrusted_code(checkpoint, trust=run.trust)
    precision = resolve_precision(params.train.precision, run.device)
    target = target_of(checkpoint, params)
    tokenizer, model = run.tokenizer(checkpoint), run.model(checkpoint)
    head, learns = Head.of(model), learning(checkpoint, target, model)
    teacher = Teacher(params, run, tokenizer, head, window_of(checkpoint, model), precision)
    lesson, held_out = teacher.training(), teacher.held_out()
    losses = {} if held_out is None else {0: held_out.mean_loss(head, run.device, precision)}
    report = train(
        model,
        lesson.batches,
        _settings(params, run),
        lesson.objective(head),
        learns,
        records=_records(checkpoint, params, run),
    )
    patch = stored(checkpoint, target, model, learns, strength=params.strength)
    if held_out is not None:
        del model, head, learns, teacher
        result = Head.of(run.model(overlay(checkpoint, patch, by=run.step)))
        losses[report.steps] = held_out.mean_loss(result, run.device, precision)
    return replace(
        patch,
        metrics={**_metrics(params, target, lesson, held_out, report, losses), **patch.metrics},
        notes=(selected(checkpoint, target), *_notes(params, lesson, report, losses)),
        reports=training_reports(report, run.step, held_out=losses),
    )


def _settings(params: FineTuneParams, run: Run) -> TrainSettings:
    options = {name: getattr(params.train, name) for name in TrainOptions.model_fields}
    return TrainSettings(**options, lr=params.rate, ema=params.ema, seed=run.seed_for("training"))


def _records(checkpoint: Checkpoint, params: FineTuneParams, run: Run) -> Records:
    return Records(
        state=run.state / "tune" if run.state else None,
        identity={"base": checkpoint.digest},
        log=params.log,
        tensorboard=params.tensorboard,
        listen=telling(run.tell),
    )


def _metrics(
    params: FineTuneParams,
    target: Target,
    lesson: Lesson,
    held_out: Lesson | None,
    report: Report,
    losses: Mapping[int, float],
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "task": params.task,
        "learnt_numbers": target.numbers,
        "strength": params.strength,
        "data": lesson.dataset.summary(),
        **report_metrics(report),
    }
    if held_out is not None:
        metrics["held_out"] = {
            "data": held_out.dataset.summary(), "loss_before": losses[0], "loss_after": losses[report.steps]
        }  # fmt: skip
    return metrics


def _notes(params: FineTuneParams, lesson: Lesson, report: Report, losses: Mapping[int, float]) -> list[str]:
    what = "pairs" if params.task == "dpo" else "sequences"
    ended = ", stopped by stop_loss" if report.stopped else ""
    fall = f"loss {report.losses[0]:.4g} in the first, {report.final_loss:.4g} in the last"
    notes = [f"{report.steps} steps of {params.batch_size} {what}{ended}: {fall}"]
    if losses:
        notes.append(f"held-out loss {losses[0]:.4g} -> {losses[report.steps]:.4g}, of the weights as they are stored")
    counts = lesson.dataset.counts
    changed = {
        "truncated": "cut to max_tokens",
        "split": "split",
        "dropped": "dropped",
        "bad_rows": "skipped as bad rows",
    }
    for name, words in changed.items():
        if counts.get(name):
            notes.append(f"{counts[name]} of {counts['rows']} rows {words}")
    return notes

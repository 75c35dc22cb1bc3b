"""Training of the head, or of everything, on the shared loop: `calibrate` first, then `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from random import Random
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.examples import Example
from regraft.core.data.load import Dataset, load_data
from regraft.core.errors import InputError, UsageError
from regraft.core.patch import Patch
from regraft.core.training.loop import Records, train
from regraft.core.training.measured import held_out_sums
from regraft.core.training.model import window_of
from regraft.core.training.modes import resolve_precision
from regraft.core.training.objectives import Objective
from regraft.core.training.progress import telling
from regraft.core.training.report import report_metrics, training_reports
from regraft.core.training.settings import TrainSettings
from regraft.core.training.trained import trained_patch
from regraft.core.training.weights import Trainable, select
from regraft.core.training.whole import completed
from regraft.core.transformation import Run
from regraft.plugins.fourier_head.adapters import Adapters, places
from regraft.plugins.fourier_head.export import Aim
from regraft.plugins.fourier_head.loss import FollowLoss, Learner, TokenLoss
from regraft.plugins.fourier_head.params import FourierHeadParams, LearnSettings, SeriesSettings
from regraft.plugins.fourier_head.series import series_data
from regraft.plugins.fourier_head.values import grid_of


def fit(checkpoint: Checkpoint, staged: Checkpoint, patch: Patch, params: FourierHeadParams, run: Run) -> Patch:
    """`patch` with what was learnt, its figures and its reports.

    Args:
        checkpoint: as the step found it.
        staged: with the head as it begins.
        patch: from one to the other.
        params: of the step.
        run: the run.

    Raises:
        RegraftError: as model and data are read, and as the training.
    """
    aim = Aim.of(checkpoint, params)
    model = run.model(staged, trust_remote_code=True)  # the code is our template's: Aim.of refuses any other
    tokenizer = run.tokenizer(staged)
    learner = Learner(model, grid_of(aim, params))
    figures, reports, names = dict[str, Any](), dict[str, FileRef](), set[str]()
    for stage, learn in (("calibrate", params.calibrate), ("train", params.train)):
        if learn is None:
            continue
        objective: Objective = TokenLoss(learner, learn.regularizer, learn.regularizer_weight)
        if stage == "calibrate":
            rows = checkpoint.load(aim.head)[aim.bins.start : aim.bins.stop].float()
            objective = FollowLoss(learner, rows)
        trainable = select(model, None if learn.weights == "full" else _of_the_head(model))
        names |= set(trainable)
        with ExitStack() as stack:
            if learn.weights == "lora":
                adapters = Adapters(model, places(aim.architecture), learn.rank, run.seed_for(f"{stage} adapters"))
                stack.callback(adapters.merge)
                stack.enter_context(adapters.attached())
                trainable, names = trainable | adapters.trainable, names | set(adapters.parameters)
            series = params.series if stage == "train" else None
            figures[stage], more = _stage(stage, staged, learner, learn, objective, trainable, tokenizer, series, run)
        reports |= more
    learnt = trained_patch(staged, model, sorted(names))
    if any(learn is not None and learn.weights == "full" for learn in (params.calibrate, params.train)):
        learnt = completed(staged, learnt, model)
    metrics = {**patch.metrics, **learnt.metrics, **figures}
    return replace(patch, edits={**patch.edits, **learnt.edits}, metrics=metrics, reports=reports)


def _of_the_head(model: Any) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if name.startswith(("lm_head.fourier.", "lm_head.gate."))]


def _stage(
    stage: str,
    staged: Checkpoint,
    learner: Learner,
    learn: LearnSettings,
    objective: Objective,
    trainable: Mapping[str, Trainable],
    tokenizer: Any,
    series: SeriesSettings | None,
    run: Run,
) -> tuple[dict[str, Any], dict[str, FileRef]]:
    seed = run.seed_for(f"{stage} data")
    if series is not None:
        dataset: Dataset = series_data(learner.model, learn, series, seed)
    else:
        dataset = load_data(learn.data, tokenizer, window=window_of(staged, learner.model), seed=seed)
    examples = [one for one in dataset.examples if isinstance(one, Example)]
    if len(examples) < len(dataset.examples):
        raise UsageError(
            "preference pairs are no texts to learn", where=f"{stage}.data: {', '.join(learn.data.sources)}",
            expected="texts, chats, or prompts with completions", remedy="give data of another kind",
        )  # fmt: skip
    training, held_out = _split(stage, examples, learn, run, whole=series is not None)
    settings = BatchSettings(
        batch_size=learn.batch_size, micro_batch=learn.micro_batch, epochs=learn.epochs, steps=learn.steps
    )
    batches = Batches(training, settings, run.seed_for(f"{stage} order"), run.rank, run.world)
    precision = resolve_precision(learn.precision, run.device)
    before = _measured(objective, held_out, learn, precision, run)
    steps = TrainSettings(
        lr=learn.lr, warmup_steps=learn.warmup_steps, schedule=learn.schedule, clip_norm=learn.clip_norm,
        precision=learn.precision, seed=run.seed_for(f"{stage} steps"),
    )  # fmt: skip
    records = Records(
        state=None if run.state is None else run.state / stage,
        identity={"checkpoint": staged.digest},
        log=learn.log,
        tensorboard=learn.tensorboard,
        listen=telling(run.tell),
    )
    run.tell(f"{stage}: {len(training)} sequences, {len(batches)} steps, {len(trainable)} tensors learn")
    report = train(learner.model, batches, steps, objective, trainable, records=records)
    after = _measured(objective, held_out, learn, precision, run)
    figures = {**report_metrics(report), "data": dataset.summary(), "held_out_sequences": len(held_out)}
    if held_out:
        figures |= {"held_out_before": before, "held_out_after": after}
    losses = {0: before["loss"], report.steps: after["loss"]} if held_out else None
    return figures, training_reports(report, f"fourier-head: {stage}", prefix=f"{stage}-", held_out=losses)


def _split(
    stage: str, examples: Sequence[Example], learn: LearnSettings, run: Run, *, whole: bool
) -> tuple[list[Example], list[Example]]:
    """Sequences to learn from, and those set aside; `whole` keeps those from one place together, as windows overlap."""
    groups: dict[object, list[Example]] = {}
    for number, one in enumerate(examples):
        groups.setdefault(one.place if whole else number, []).append(one)
    drawn = list(groups.values())
    Random(run.seed_for(f"{stage} held-out")).shuffle(drawn)
    kept = sum(map(len, drawn[: round(len(drawn) * learn.held_out)]))
    order = [one for group in drawn for one in group]
    if len(order) - kept < learn.batch_size:
        raise InputError(
            "there are fewer sequences than a batch takes", where=f"{stage}.data",
            expected=f"at least {learn.batch_size} to learn from", found=f"{len(order)}, {kept} of them held out",
            remedy="give more data, or lower batch_size or held_out",
        )  # fmt: skip
    return order[kept:], order[:kept]


def _measured(
    objective: Objective, held_out: Sequence[Example], learn: LearnSettings, precision: str, run: Run
) -> dict[str, float]:
    """The mean loss of a held-out token, and its parts, each over the tokens that it is about."""
    if not held_out:
        return {}
    size = min(learn.micro_batch or learn.batch_size, len(held_out))
    batches = Batches(held_out, BatchSettings(batch_size=size, shuffle=False, drop_last=False))
    sums, tokens = held_out_sums(objective, batches, run.device, precision)
    numbers = sums.pop("numbers", None)
    counts = {"number_nll": numbers, "text_nll": tokens - (numbers or 0)}
    return {name: value / (counts.get(name) or tokens) for name, value in sums.items()}

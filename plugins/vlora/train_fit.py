"""The run: language model, generator, data, training, and the patch with what was learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.settings import DataSettings
from regraft.core.errors import Unsupported
from regraft.core.patch import Patch
from regraft.core.training.head import Head
from regraft.core.training.loop import Records, Report, train
from regraft.core.training.model import memory, window_of
from regraft.core.training.modes import computing, reproducible, resolve_precision
from regraft.core.training.progress import telling
from regraft.core.training.report import report_metrics, training_reports
from regraft.core.training.settings import TrainSettings
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.training.trained import trained_patch
from regraft.core.training.whole import completed
from regraft.core.transformation import Run
from regraft.plugins.vlora.generator import PerceptualGenerator, new_generator
from regraft.plugins.vlora.settings import GeneratorSettings
from regraft.plugins.vlora.train_attach import Attached
from regraft.plugins.vlora.train_data import ShownBatches, ShownData, load_shown
from regraft.plugins.vlora.train_model import LANGUAGE, SeenAnswers, Sighted
from regraft.plugins.vlora.train_own import OWN, OWN_CONFIG, OWN_WEIGHTS, config_change, weights_file
from regraft.plugins.vlora.train_params import VloraTrainParams
from regraft.plugins.vlora.train_pictures import Pictures
from regraft.plugins.vlora.train_rewrite import Aim

HOW_TO_USE = (
    f'the generator is in {OWN}/: a step with use = "vlora" and that folder as `generator` bakes an image into this '
    "checkpoint"
)


@dataclass(frozen=True)
class _Lesson:
    """Data in batches."""

    data: ShownData
    steps: ShownBatches

    @torch.no_grad()
    def mean_loss(self, objective: SeenAnswers, device: str, precision: str) -> float:
        """The loss of a learnt token over all batches of an epoch, without learning."""
        kind, total, units = torch.device(device), 0.0, 0
        with reproducible(kind), memory("measuring the held-out loss"), objective.attached.attached():
            for step in range(self.steps.per_epoch):
                units += self.steps.units(step)
                for piece in self.steps.micro(step, device):
                    with computing(kind.type, precision):
                        total += objective(piece)[0].item()
        return total / units


def fit(checkpoint: Checkpoint, params: VloraTrainParams, run: Run) -> Patch:
    """The patch with the generator and, in the second stage, the language model's weights.

    Raises:
        RegraftError: see `VloraTrain.apply`.
    """
    refuse_untrusted_code(checkpoint, trust=run.trust)
    precision = resolve_precision(params.learning.precision, run.device)
    aim = Aim.of(checkpoint, params)
    tokenizer, language = run.tokenizer(checkpoint), run.model(checkpoint, **_held(params, precision, run))
    generator = _generator(aim, run)
    pictures = Pictures(params, aim.settings, run.device)
    model = Sighted(language, generator)
    keys = [(kind, layer) for kind in aim.settings.types for layer in aim.settings.active_layers]
    attached = Attached(language, aim.architecture, keys, aim.settings.scale)
    objective = SeenAnswers(Head.of(language), generator, attached, pictures.look)
    lesson = _lesson("data", params.data, checkpoint, params, tokenizer, language, pictures, run)
    held_out = None
    if params.held_out is not None:
        held_out = _lesson("held_out", params.held_out, checkpoint, params, tokenizer, language, pictures, run)
    losses = {} if held_out is None else {0: held_out.mean_loss(objective, run.device, precision)}
    learns = model.trainable(params.train)
    numbers = sum(one.parameter.numel() for one in learns.values())
    run.tell(f"{len(lesson.data.pictures)} pictures, {len(lesson.steps)} steps, {numbers} numbers learn")
    with attached.attached():
        report = train(
            model, lesson.steps, _settings(params, lesson.steps, run), objective, learns,
            records=_records(checkpoint, aim.settings, params, run),
        )  # fmt: skip
    if held_out is not None:
        losses[report.steps] = held_out.mean_loss(objective, run.device, precision)
    learnt = Patch()
    if params.train == "both":
        names = [name.removeprefix(f"{LANGUAGE}.") for name in learns if name.startswith(f"{LANGUAGE}.")]
        learnt = completed(checkpoint, trained_patch(checkpoint, language, names), language)
    change = config_change(checkpoint, aim.settings)
    return replace(
        learnt,
        json={OWN_CONFIG: change} if change else {},
        files={OWN_WEIGHTS: weights_file(generator, run)},
        metrics={**learnt.metrics, **_metrics(params, aim, lesson, held_out, numbers, report, losses)},
        notes=(*aim.notes, *_notes(report, losses)),
        reports=training_reports(report, run.step, held_out=losses or None),
    )


def _held(params: VloraTrainParams, precision: str, run: Run) -> dict[str, Any]:
    """How the language model's weights are held, as `Run.model` takes it.

    Raises:
        Unsupported: they are to be bfloat16, and products are not.
    """
    frozen = params.frozen
    if frozen == "bfloat16" and precision != "bfloat16":
        raise Unsupported(
            "weights that are held in bfloat16 compute in it, which this device does many times slower",
            where="frozen", found=run.device, remedy='use frozen = "float32"',
        )  # fmt: skip
    return {"dtype": frozen} if frozen in ("float32", "bfloat16") else {"quantize": frozen, "dtype": precision}


def _generator(aim: Aim, run: Run) -> PerceptualGenerator:
    if aim.source is None:
        return new_generator(aim.settings, run.seed_for("generator")).to(run.device)
    return aim.source().load(run.device)


def _lesson(
    key: str,
    settings: DataSettings,
    checkpoint: Checkpoint,
    params: VloraTrainParams,
    tokenizer: Any,
    language: Any,
    pictures: Pictures,
    run: Run,
) -> _Lesson:
    data = load_shown(
        settings, tokenizer, window=window_of(checkpoint, language), check=pictures.check, images=params.images,
        placeholder=params.placeholder, seed=run.seed_for(key),
    )  # fmt: skip
    if key == "held_out":
        size = min(params.micro_batch, len(data.dataset.examples))
        kept = BatchSettings(batch_size=size, shuffle=False, drop_last=False)
        return _Lesson(data, ShownBatches(data, Batches(data.dataset.examples, kept)))
    gathered = BatchSettings(
        batch_size=params.rows,
        micro_batch=params.micro_batch,
        epochs=params.epochs,
        steps=params.steps,
        shuffle=params.learning.shuffle,
        drop_last=params.learning.drop_last,
    )
    batches = Batches(data.dataset.examples, gathered, run.seed_for("order"), run.rank, run.world)
    return _Lesson(data, ShownBatches(data, batches))


def _settings(params: VloraTrainParams, steps: ShownBatches, run: Run) -> TrainSettings:
    given = {name: getattr(params.learning, name) for name in type(params.learning).model_fields}
    options = {name: value for name, value in given.items() if name not in ("shuffle", "drop_last")}
    if "warmup_steps" not in params.learning.model_fields_set:
        options["warmup_steps"] = math.ceil(params.warmup * len(steps))
    return TrainSettings(**options, lr=params.rate, seed=run.seed_for("training"))


def _records(checkpoint: Checkpoint, settings: GeneratorSettings, params: VloraTrainParams, run: Run) -> Records:
    return Records(
        state=run.state / "tune" if run.state else None,
        identity={"base": checkpoint.digest, "generator": settings.model_dump(mode="json"), "frozen": params.frozen},
        log=params.log,
        tensorboard=params.tensorboard,
        listen=telling(run.tell),
    )


def _metrics(
    params: VloraTrainParams,
    aim: Aim,
    lesson: _Lesson,
    held_out: _Lesson | None,
    numbers: int,
    report: Report,
    losses: Mapping[int, float],
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "train": params.train,
        "generator_numbers": aim.settings.num_parameters,
        "learnt_numbers": numbers,
        "active_layers": list(aim.settings.active_layers),
        "data": lesson.data.summary(),
        **report_metrics(report),
    }
    if held_out is not None:
        metrics["held_out"] = {
            "data": held_out.data.summary(), "loss_before": losses[0], "loss_after": losses[report.steps]
        }  # fmt: skip
    return metrics


def _notes(report: Report, losses: Mapping[int, float]) -> list[str]:
    ended = ", stopped by stop_loss" if report.stopped else ""
    fall = f"loss {report.losses[0]:.4g} in the first, {report.final_loss:.4g} in the last"
    notes = [f"{report.steps} steps{ended}: {fall}", HOW_TO_USE]
    if losses:
        notes.append(f"held-out loss {losses[0]:.4g} -> {losses[report.steps]:.4g}")
    return notes

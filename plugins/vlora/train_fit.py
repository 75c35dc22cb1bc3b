"""The run: language model, generator, data, training, and the patch with what was learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.patch import Patch
from regraft.core.training.head import Head
from regraft.core.training.loop import Records, Report, train
from regraft.core.training.model import window_of
from regraft.core.training.modes import resolve_precision
from regraft.core.training.progress import telling
from regraft.core.training.report import report_metrics, training_reports
from regraft.core.training.settings import TrainOptions, TrainSettings
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.training.trained import trained_patch
from regraft.core.training.weights import Trainable
from regraft.core.training.whole import completed
from regraft.core.transformation import Run
from regraft.plugins.vlora.generator import PerceptualGenerator, new_generator
from regraft.plugins.vlora.settings import GeneratorSettings
from regraft.plugins.vlora.train_attach import Attached
from regraft.plugins.vlora.train_data import ShownBatches
from regraft.plugins.vlora.train_lesson import Lesson, Teacher
from regraft.plugins.vlora.train_model import LANGUAGE, SeenAnswers, Sighted
from regraft.plugins.vlora.train_own import OWN, OWN_CONFIG, OWN_WEIGHTS, config_change, weights_file
from regraft.plugins.vlora.train_params import VloraTrainParams
from regraft.plugins.vlora.train_pictures import Pictures
from regraft.plugins.vlora.train_rewrite import Aim

HOW_TO_USE = (
    f'the generator is in {OWN}/: a step with use = "vlora" and that folder as `generator` bakes an image into this '
    "checkpoint"
)


def fit(checkpoint: Checkpoint, params: VloraTrainParams, run: Run) -> Patch:
    """The patch with the generator and, in the second stage, the language model's weights.

    Raises:
        RegraftError: see `VloraTrain.apply`.
    """
    refuse_untrusted_code(checkpoint, trust=run.trust)
    precision = resolve_precision(params.learning.precision, run.device)
    aim = Aim.of(checkpoint, params)
    tokenizer, language = run.tokenizer(checkpoint), run.model(checkpoint, **_held(params, precision, run))
    generator, pictures = _generator(aim, run), Pictures(params, aim.settings, run.device)
    keys = [(kind, layer) for kind in aim.settings.types for layer in aim.settings.active_layers]
    attached = Attached(language, aim.architecture, keys, aim.settings.scale)
    objective = SeenAnswers(Head.of(language), generator, attached, pictures.look)
    teacher = Teacher(params, run, tokenizer, window_of(checkpoint, language), pictures)
    lesson, held_out = teacher.training(), teacher.held_out()
    losses = {} if held_out is None else {0: held_out.mean_loss(objective, run.device, precision)}
    model = Sighted(language, generator)
    learns = model.trainable(params.train)
    run.tell(f"{len(lesson.data.pictures)} pictures, {len(lesson.steps)} steps, {_numbers(learns)} numbers learn")
    with attached.attached():
        report = train(
            model, lesson.steps, _settings(params, lesson.steps, run), objective, learns,
            records=_records(checkpoint, aim.settings, params, run, _eyes(lesson, pictures) if run.state else ""),
        )  # fmt: skip
    if held_out is not None:
        losses[report.steps] = held_out.mean_loss(objective, run.device, precision)
    learnt, change = _learnt(checkpoint, language, learns), config_change(checkpoint, aim.settings)
    return replace(
        learnt,
        json={OWN_CONFIG: change} if change else {},
        files={OWN_WEIGHTS: weights_file(generator, run)},
        metrics={
            "train": params.train,
            "generator_numbers": aim.settings.num_parameters,
            "learnt_numbers": _numbers(learns),
            "active_layers": list(aim.settings.active_layers),
            "data": lesson.data.summary(),
            **report_metrics(report),
            **_held_out_metrics(held_out, losses, report),
            **learnt.metrics,
        },
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


def _settings(params: VloraTrainParams, steps: ShownBatches, run: Run) -> TrainSettings:
    options = {name: getattr(params.learning, name) for name in TrainOptions.model_fields}
    if "warmup_steps" not in params.learning.model_fields_set:
        options["warmup_steps"] = math.ceil(params.warmup * len(steps))
    return TrainSettings(**options, lr=params.rate, seed=run.seed_for("training"))


def _eyes(lesson: Lesson, pictures: Pictures) -> str:
    """A digest of the encoder that looks at the training's images; empty where features alone are read."""
    looks = any(picture.image for picture in lesson.data.pictures)
    return pictures.tower.sha256() if looks and pictures.tower is not None else ""


def _records(
    checkpoint: Checkpoint, settings: GeneratorSettings, params: VloraTrainParams, run: Run, eyes: str
) -> Records:
    return Records(
        state=run.state / "tune" if run.state else None,
        identity={
            "base": checkpoint.digest,
            "generator": settings.model_dump(mode="json"),
            "frozen": params.frozen,
            "vision": eyes,
        },
        log=params.log,
        tensorboard=params.tensorboard,
        listen=telling(run.tell),
    )


def _numbers(learns: Mapping[str, Trainable]) -> int:
    return sum(one.parameter.numel() for one in learns.values())


def _learnt(checkpoint: Checkpoint, language: Any, learns: Mapping[str, Trainable]) -> Patch:
    """What the language model has learnt; nothing in the first stage."""
    names = [name.removeprefix(f"{LANGUAGE}.") for name in learns if name.startswith(f"{LANGUAGE}.")]
    return completed(checkpoint, trained_patch(checkpoint, language, names), language) if names else Patch()


def _held_out_metrics(held_out: Lesson | None, losses: Mapping[int, float], report: Report) -> dict[str, Any]:
    if held_out is None:
        return {}
    after = losses[report.steps]
    return {"held_out": {"data": held_out.data.summary(), "loss_before": losses[0], "loss_after": after}}


def _notes(report: Report, losses: Mapping[int, float]) -> list[str]:
    ended = ", stopped by stop_loss" if report.stopped else ""
    fall = f"loss {report.losses[0]:.4g} in the first, {report.final_loss:.4g} in the last"
    notes = [f"{report.steps} steps{ended}: {fall}", HOW_TO_USE]
    if losses:
        notes.append(f"held-out loss {losses[0]:.4g} -> {losses[report.steps]:.4g}")
    return notes

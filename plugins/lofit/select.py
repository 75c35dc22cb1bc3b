"""Stage 1: which heads learn offsets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from regraft.core.errors import TransformationError
from regraft.core.head_file import Head
from regraft.core.training.loop import Report, train
from regraft.core.training.model import memory
from regraft.core.training.modes import computing, reproducible, without_dropout
from regraft.plugins.lofit.adapters import HeadScales
from regraft.plugins.lofit.aim import Aim
from regraft.plugins.lofit.lesson import Lesson
from regraft.plugins.lofit.math import best, drawn


@dataclass(frozen=True)
class Selection:
    """What stage 1 gives.

    Args:
        heads: chosen, the best first.
        scores: by head; nothing where none were computed.
        report: of the training, if there was one.
    """

    heads: Sequence[Head]
    scores: Mapping[Head, float] = field(default_factory=dict)
    report: Report | None = None


def select_heads(lesson: Lesson, aim: Aim) -> Selection:
    """Choose `aim.count` heads as the parameters say. Nothing that is learnt here is used afterwards.

    Raises:
        TransformationError: a loss or a gradient is not finite.
    """
    match lesson.params.scoring:
        case "file":
            return Selection(aim.named, aim.named_scores)
        case "random":
            return Selection(drawn(aim.layers, aim.units, aim.count, lesson.run.seed_for("heads")))
        case "grad":
            scores, report = _by_gradient(lesson, aim), None
        case "scale":
            scores, report = _by_scale(lesson, aim)
    return Selection(best(scores, aim.count), scores, report)


def _by_scale(lesson: Lesson, aim: Aim) -> tuple[dict[Head, float], Report]:
    """‖A‖₂ of scales that were learnt under λ·Σ|A|."""
    params, given = lesson.params, lesson.params.select
    scales = HeadScales(lesson.model, lesson.architecture, aim.layers, params.site, seed=lesson.run.seed_for("scales"))
    lesson.run.tell(f"stage 1: scales of {len(aim.layers) * aim.units} heads, to choose {aim.count}")
    objective = lesson.objective(lesson.head)
    with scales.attached():
        report = train(
            lesson.model,
            lesson.batches("select", given),
            lesson.settings("select", given),
            objective,
            scales.trainable,
            penalty=scales.penalty(given.l1) if given.l1 else None,
            records=lesson.records("select", l1=given.l1),
        )
    return _norms({layer: one.detach() for layer, one in scales.parameters.items()}), report


def _by_gradient(lesson: Lesson, aim: Aim) -> dict[Head, float]:
    """‖∂L/∂A‖₂ at A = 0, L the mean loss over the data; under torchrun every process passes over all of it."""
    scales = HeadScales(lesson.model, lesson.architecture, aim.layers, lesson.params.site, std=0.0)
    lesson.run.tell(f"stage 1: gradients of the scales of {len(aim.layers) * aim.units} heads, to choose {aim.count}")
    objective = lesson.objective(lesson.head)
    given = lesson.params.select.model_copy(update={"epochs": 1, "steps": None})
    batches = replace(lesson.batches("select", given), rank=0, world=1)
    device = torch.device(lesson.device)
    units = sum(batches.units(step) for step in range(len(batches)))
    for one in scales.parameters.values():
        one.requires_grad_(True)
    with reproducible(device), without_dropout(lesson.model), memory("scoring heads"), scales.attached():
        lesson.model.train()
        for step in range(len(batches)):
            for piece in batches.micro(step, lesson.device):
                with computing(device.type, lesson.precision):
                    loss, _ = objective(piece)
                (loss / units).backward()  # type: ignore[no-untyped-call]
        lesson.model.eval()
    gradients = {layer: one.grad for layer, one in scales.parameters.items() if one.grad is not None}
    return _norms(gradients)


def _norms(values: Mapping[int, torch.Tensor]) -> dict[Head, float]:
    """Norms of the rows [U, d_h] of every layer.

    Raises:
        TransformationError: one is not finite.
    """
    norms = {
        (layer, unit): norm
        for layer, rows in values.items()
        for unit, norm in enumerate(rows.double().norm(dim=1).tolist())
    }
    for (layer, unit), norm in norms.items():
        if not math.isfinite(norm):
            raise TransformationError(
                "the score of a head is not finite",
                where=f"layer {layer}, head {unit}",
                expected="a number",
                found=norm,
                remedy="look at the data and the weights: a loss or an activation is not finite",
            )
    return norms

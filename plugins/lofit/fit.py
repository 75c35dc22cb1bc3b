"""Both stages, one after the other: from a checkpoint and data to the offsets of the chosen heads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import ResourceError, Unsupported
from regraft.core.head_file import Head
from regraft.core.training.head import Head as OutputHead
from regraft.core.training.last_mlp import last_mlp
from regraft.core.training.loop import Report, train
from regraft.core.training.modes import computing, reproducible, without_dropout
from regraft.core.training.modules import layer_modules
from regraft.core.training.objectives import Objective
from regraft.core.training.prefix import PrefixCache, predicted_speed_up
from regraft.core.transformation import Run
from regraft.plugins.lofit.adapters import HeadOffsets
from regraft.plugins.lofit.aim import Aim
from regraft.plugins.lofit.lesson import Lesson
from regraft.plugins.lofit.math import by_layer
from regraft.plugins.lofit.params import LofitParams
from regraft.plugins.lofit.select import Selection, select_heads


@dataclass(frozen=True)
class Learnt:
    """The result of both stages.

    Args:
        selection: of stage 1.
        vectors: the offset [head_dim] of each chosen head.
        report: of stage 2.
        data: what it learnt from, for the metrics.
        held_out: loss and other figures of held-out data, `before` and `after`; nothing without such data.
        prefix: what the prefix cache did, or why there was none; no times.
    """

    selection: Selection
    vectors: Mapping[Head, torch.Tensor]
    report: Report
    data: Mapping[str, Any]
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    prefix: Mapping[str, Any] = field(default_factory=dict)


def learn(checkpoint: Checkpoint, params: LofitParams, aim: Aim, run: Run) -> Learnt:
    """Choose heads, and learn their offsets.

    Raises:
        RegraftError: as model and data are read, and as `train`.
    """
    lesson = Lesson(checkpoint, aim.architecture, params, run)
    judge = lesson.judge()
    before = {} if judge is None else {"before": judge()}
    selection = select_heads(lesson, aim)
    chosen = by_layer(selection.heads)
    offsets = HeadOffsets(lesson.model, aim.architecture, chosen, params.site)
    run.tell(f"stage 2: {offsets.count} numbers of {len(selection.heads)} heads, lowest layer {min(chosen)}")
    head, prefix = _with_prefix(lesson, min(chosen))
    objective = lesson.objective(head)
    batches = lesson.batches("tune", params.tune)
    with offsets.attached():
        if head is not lesson.head:
            _tell_speed_up(lesson, offsets, lesson.objective(lesson.head), objective)
        report = train(
            lesson.model,
            batches,
            lesson.settings("tune", params.tune),
            objective,
            offsets.trainable,
            records=lesson.records("tune", heads=[list(head) for head in selection.heads]),
        )
        after = {} if judge is None else {"after": judge()}
    return Learnt(selection, offsets.vectors(), report, lesson.data.summary(), {**before, **after}, prefix)


def _with_prefix(lesson: Lesson, first: int) -> tuple[OutputHead, dict[str, Any]]:
    """The head that stage 2 uses, with the layers below `first` cached where that is wanted and possible."""
    params, tell = lesson.params, lesson.run.tell
    if params.prefix_cache == "off":
        return lesson.head, {"cached_layers": 0, "reason": "prefix_cache is off"}
    if first == 0:
        tell("prefix cache: none, a head of layer 0 is chosen; `layers` can keep the lowest ones out")
        return lesson.head, {"cached_layers": 0, "reason": "a head of layer 0 is chosen"}
    try:
        cache = PrefixCache(
            lesson.head,
            layer_modules(lesson.model, lesson.architecture),
            first,
            lesson.batches("tune", params.tune),
            precision=lesson.precision,
            max_bytes=params.prefix_bytes,
            last_mlp=last_mlp(lesson.model, lesson.architecture),
        )
    except (Unsupported, ResourceError) as error:
        if params.prefix_cache == "on":
            raise
        reason = f"{error.message}: {error.found}"
        tell(f"prefix cache: none, {reason}")
        return lesson.head, {"cached_layers": 0, "reason": reason}
    layers = lesson.architecture.num_layers
    gain = predicted_speed_up(layers, first)
    tell(
        f"prefix cache: the lower {first} of {layers} layers ran once, {cache.tokens} tokens, "
        f"{cache.nbytes / 1e6:.1f} MB; by their number a step should be {gain:.2f} times as fast"
    )
    return cache.head, {"cached_layers": first, "bytes": cache.nbytes, "predicted_speed_up": round(gain, 4)}


def _tell_speed_up(lesson: Lesson, offsets: HeadOffsets, whole: Objective, cached: Objective) -> None:
    """Say how much faster a step is with the cache than without: the faster of two tries each, on the first batch."""
    size = min(lesson.params.micro_batch or lesson.params.batch_size, len(lesson.data.examples))
    batch = lesson.batches("tune", lesson.params.tune).gather(range(size), lesson.device)
    seconds = {"whole": float("inf"), "cached": float("inf")}
    device = torch.device(lesson.device)
    for one in offsets.parameters.values():
        one.requires_grad_(True)
    with reproducible(device), without_dropout(lesson.model):
        for _ in range(2):
            for name, objective in (("cached", cached), ("whole", whole)):
                started = _now(device)
                with computing(device.type, lesson.precision):
                    loss, _ = objective(batch)
                torch.autograd.grad(loss, list(offsets.parameters.values()))
                seconds[name] = min(seconds[name], _now(device) - started)
    gain = seconds["whole"] / seconds["cached"]
    lesson.run.tell(f"prefix cache: {gain:.2f} times as fast as without, measured on the first batch")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

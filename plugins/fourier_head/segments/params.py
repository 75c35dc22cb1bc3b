"""The table `segments` of `fourier-head`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.recipe.references import DataReference, OutputPath
from regraft.core.training.settings import Positive, Share
from regraft.core.transformation import Params

Count = Annotated[int, Field(ge=1)]


class SegmentSettings(Params):
    """How a forecaster over segments is built, and how its maps learn; everything else of the model is frozen.

    Args:
        data: rows `{"series": [numbers]}`; with stamps also `"start"`, an ISO date, and `"step"`, seconds.
        length: S, numbers of a segment.
        context: numbers that a forecast sees, a multiple of `length`.
        width: of a hidden layer with tanh in both maps; None for linear maps, as in the paper.
        stamps: mix in what the model makes of a text that says when the segment was.
        stride: numbers between two windows of training; None takes `length`.
        held_out: share at the end of every series that measures the forecasts, and is not trained on.
        epochs, steps: passes over the windows, and the most steps.
        batch_size, micro_batch: windows of a step, and those computed at once.
        lr, warmup_steps, schedule: the learning rate.
        clip_norm: longest gradient.
        precision: of products.
        log, tensorboard: where each step is recorded, with times.
    """

    data: DataReference | tuple[DataReference, ...]
    length: Count = 96
    context: Count = 672
    width: Count | None = None
    stamps: bool = False
    stride: Count | None = None
    held_out: Share = 0.2
    epochs: Count = 10
    steps: Count | None = None
    batch_size: Count = 256
    micro_batch: Count | None = None
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    clip_norm: Positive | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    log: OutputPath | None = None
    tensorboard: OutputPath | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, in order."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def count(self) -> int:
        """Segments that a forecast sees."""
        return self.context // self.length

    @model_validator(mode="after")
    def _whole_segments(self) -> Self:
        if self.context % self.length:
            raise ValueError(f"context ({self.context}) is a multiple of length ({self.length})")
        return self

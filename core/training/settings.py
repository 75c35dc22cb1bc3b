"""The keys of a recipe that steer the training loop. Light: a transformation's parameters hold them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from regraft.core.transformation import Params

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class SpamSettings(Params):
    """What SPAM adds to Adam (arXiv 2501.06842).

    Args:
        reset_every: steps after which both moments are set to zero; None never.
        warmup_steps: over which the step size comes back after a reset.
        threshold: g² beyond so many times the second moment is a spike.
        grace_steps: after the start and after a reset, in which nothing counts as a spike.
    """

    reset_every: Annotated[int, Field(ge=1)] | None = 500
    warmup_steps: Annotated[int, Field(ge=0)] = 150
    threshold: Positive = 5000.0
    grace_steps: Annotated[int, Field(ge=0)] = 20


class TrainOptions(Params):
    """How weights learn, beside the rate: what a step's own keys need not repeat.

    Args:
        optimizer: `adamw`; `adamw-8bit`, whose moments take two bytes a weight; `spam`.
        betas, eps: of Adam; without `eps` 1e-8, for SPAM 1e-6.
        weight_decay: of matrices; norms and biases never decay.
        schedule: after the warmup `constant`, or to `final_lr` by a straight line or half a cosine.
        warmup_steps: over which the rate grows to the peak.
        final_lr: share of the peak at the end of the schedule.
        clip_norm: longest gradient, over all weights together; None leaves gradients as they are.
        precision: `bfloat16` computes by autocast, with fp32 weights; `auto` does so where the device is fast at it.
        stop_loss: end when the mean loss of the last `stop_window` steps is below.
        stop_window: None takes the steps of an epoch.
        dropout: keep the model's own dropout; by default it is off.
        gradient_checkpointing: compute activations again in the backward pass: less memory, a third more time.
        spam: for `spam`.
        log_every, save_every: steps between two lines of the log, and between two saved states.
    """

    optimizer: Literal["adamw", "adamw-8bit", "spam"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip_norm: Positive | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    stop_loss: float | None = None
    stop_window: Annotated[int, Field(ge=1)] | None = None
    dropout: bool = False
    gradient_checkpointing: bool = False
    spam: SpamSettings = Field(default_factory=SpamSettings)
    log_every: Annotated[int, Field(ge=1)] = 1
    save_every: Annotated[int, Field(ge=1)] = 100


class EpochOptions(TrainOptions):
    """How weights learn from epochs of data; see `TrainOptions`.

    Args:
        shuffle: another order in every epoch.
        drop_last: leave out the last batch of an epoch if it is not full.
    """

    shuffle: bool = True
    drop_last: bool = True


class TrainSettings(TrainOptions):
    """How weights learn.

    Args:
        lr: the peak of the learning rate.
        master_weights: weights that are stored in less than fp32 learn in an fp32 copy.
        ema: the result is the exponential moving average with this decay; None takes the last weights.
        seed: of dropout.
    """

    lr: Annotated[float, Field(ge=0)] = 1e-5
    master_weights: bool = True
    ema: Share | None = None
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What decides the weights; how often something is written does not. JSON values."""
        return self.model_dump(mode="json", exclude={"log_every", "save_every"})

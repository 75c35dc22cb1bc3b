"""Parameters of `fine-tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.settings import Data
from regraft.core.recipe.references import OutputPath
from regraft.core.training.settings import EpochOptions
from regraft.core.transformation import Params

Task = Literal["sft", "text", "dpo"]
Selection = Literal["all", "heads", "names"]

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]

_RATES = {"sft": 1e-5, "text": 1e-5, "dpo": 1e-6}


class FineTuneOptions(EpochOptions):
    """What else decides how weights learn."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"


class FineTuneParams(Params):
    """What learns, from what, and how long."""

    data: Data = Field(
        description="What to learn from: a file, several, a folder, or a table with `source` and how rows are read; "
        "see the page on training."
    )
    held_out: Data | None = Field(
        None, description="Data of the same kind, on which the loss is measured before and after."
    )
    task: Task = Field(
        "sft",
        description="sft: cross-entropy of the answers, from prompts and completions or chats. text: of every token. "
        "dpo: direct preference optimisation, from preference pairs.",
    )
    select: Selection = Field(
        "all",
        description="What learns. all: every weight. heads: the slices of `heads` alone. names: the tensors that "
        "`names` says. All other bytes stay.",
    )
    heads: Annotated[tuple[tuple[Index, Index], ...], Field(min_length=1)] | Path | None = Field(
        None,
        description="select = heads: a list of [layer, head], both from 0, or a heads.json, such as a lofit or steer "
        "step reports. Of each head its rows of q_proj and its columns of o_proj learn.",
    )
    kv: bool | None = Field(
        None,
        description="select = heads: whether the rows of k_proj and v_proj that a head reads learn too. Default: where "
        "no other query head shares them.",
    )
    names: Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        None,
        description="select = names: patterns of tensor names in the checkpoint, such as "
        '`["*.mlp.*", "*norm.weight"]`; * and ? stand for any text and any character.',
    )
    lr: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Peak of the learning rate. Default: 1e-5, for dpo 1e-6."
    )
    epochs: Count = Field(1, description="Passes over the data.")
    steps: Count | None = Field(None, description="End after so many steps, before the epochs do.")
    batch_size: Count = Field(8, description="Sequences, or pairs, of a step.")
    micro_batch: Count | None = Field(
        None, description="How many of them are computed at once; fewer take less memory. Default: all."
    )
    beta: float = Field(
        0.1,
        gt=0,
        allow_inf_nan=False,
        description="task = dpo: how far the model may go from the base; larger is nearer.",
    )
    ema: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Store the exponential moving average of the weights, with this decay. Default: the last."
    )
    strength: float = Field(
        1.0,
        allow_inf_nan=False,
        description="How much of the change is stored: W + strength (W_tuned - W). 0: the base; 1: what was trained.",
    )
    train: FineTuneOptions = Field(
        default_factory=FineTuneOptions,
        description="The rest: { optimizer, betas, eps, weight_decay, schedule, warmup_steps, final_lr, clip_norm, "
        "precision, stop_loss, stop_window, dropout, gradient_checkpointing, spam, shuffle, drop_last, log_every, "
        "save_every }.",
    )
    log: OutputPath | None = Field(None, description="A file that gets a line of JSON for each step.")
    tensorboard: OutputPath | None = Field(None, description="A folder that gets TensorBoard events.")

    @property
    def rate(self) -> float:
        """The peak of the learning rate."""
        return _RATES[self.task] if self.lr is None else self.lr

    @model_validator(mode="after")
    def _what_learns(self) -> Self:
        for key, selection in (("heads", "heads"), ("names", "names"), ("kv", "heads")):
            if getattr(self, key) is not None and self.select != selection:
                raise ValueError(f'{key} is for select = "{selection}": set that, or remove {key}')
        if self.select != "all" and getattr(self, self.select) is None:
            raise ValueError(f'select = "{self.select}" needs `{self.select}`')
        return self

    @model_validator(mode="after")
    def _what_is_learnt(self) -> Self:
        if "beta" in self.model_fields_set and self.task != "dpo":
            raise ValueError('beta is for task = "dpo"')
        for key, settings in (("data", self.data), ("held_out", self.held_out)):
            if settings is None or "learn" not in settings.model_fields_set:
                continue
            if settings.learn != ("all" if self.task == "text" else "answer"):
                raise ValueError(f'{key}.learn contradicts task = "{self.task}": remove it')
        return self

"""Parameters of `hyperfitting`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.settings import Data, DataSettings
from regraft.core.recipe.references import OutputPath
from regraft.core.transformation import Params

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]

_OURS = {"max_tokens": "seq_len", "min_tokens": "seq_len", "pack": "pack", "too_long": "pack", "max_rows": "samples"}
"""Keys of the data that follow from keys of the step."""


class ReportSettings(Params):
    """What is measured before and after.

    Args:
        samples: held-out sequences whose beginnings are continued; 0 for none.
        context: tokens of such a beginning.
        prompts: texts to continue, in place of held-out beginnings.
        new_tokens: tokens to generate, greedily; None fills `seq_len`, but at least `ttr_window`.
        ttr_window: last tokens of a continuation in which different tokens are counted.
        citation_ngram: so many tokens in a row that stand in the training data are a citation.
    """

    samples: Annotated[int, Field(ge=0)] = 32
    context: Count = 32
    prompts: tuple[Text, ...] = ()
    new_tokens: Count | None = None
    ttr_window: Count = 96
    citation_ngram: Count = 8

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.new_tokens is not None and self.new_tokens < self.ttr_window:
            raise ValueError(f"ttr_window ({self.ttr_window} tokens) is longer than new_tokens ({self.new_tokens})")
        return self


class HyperfittingParams(Params):
    """Parameters of `hyperfitting`; the defaults are the paper's."""

    data: Data = Field(
        description="The texts to train on: a file, several, a folder, or a table with `source` and how rows are read. "
        "Every token is learnt unless the table says `learn = \"answer\"`."
    )  # fmt: skip
    samples: Count = Field(2000, description="Sequences to train on, drawn at random; all where there are fewer.")
    seq_len: int = Field(256, ge=2, description="Tokens of a sequence.")
    pack: bool = Field(
        True,
        description="One stream of all texts is cut into sequences. false: the first seq_len tokens of each text that "
        "has so many.",
    )
    epochs: Count = Field(20, description="Passes over the sequences, at most.")
    batch_size: Count = Field(8, description="Sequences of a step.")
    micro_batch: Count | None = Field(
        None, description="Sequences that are computed at once; the result is the same with less memory. Default: all."
    )
    lr: float = Field(1e-6, ge=0, allow_inf_nan=False, description="Learning rate, constant.")
    optimizer: Literal["adamw", "adamw-8bit", "spam"] = Field(
        "adamw", description="adamw; adamw-8bit, with moments of two bytes a weight; spam. None decays weights."
    )
    clip_norm: Positive | None = Field(None, description="Longest gradient. Default: as it is.")
    stop_loss: float = Field(
        0.05,
        ge=0,
        allow_inf_nan=False,
        description="End when the mean training loss of an epoch is below. 0: only after all epochs.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of products. Weights learn in float32. auto: bfloat16 where the device is fast at it."
    )
    ema: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Store the exponential moving average of the weights, with this decay. Default: the last."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more time.")
    strength: float = Field(
        1.0,
        allow_inf_nan=False,
        description="How much of the change is stored: W + strength (W_tuned - W). 0: the base; 1: what was trained.",
    )
    held_out: Annotated[int, Field(ge=0)] | Share | Data = Field(
        0.05,
        description="What measures the effect and is not trained on: a number of sequences, a share of the sequences "
        "drawn, or data of its own.",
    )
    report: ReportSettings = Field(
        ReportSettings(),
        description="What is measured: { samples = 32, context = 32, prompts, new_tokens, ttr_window = 96, "
        "citation_ngram = 8 }.",
    )
    save_every: Count = Field(100, description="Steps between two saved states, from which an interrupted run goes on.")
    log: OutputPath | None = Field(None, description="A file that gets a line of JSON for each step.")
    tensorboard: OutputPath | None = Field(None, description="A folder that gets TensorBoard events.")

    @property
    def new_tokens(self) -> int:
        """Tokens of a continuation."""
        report = self.report
        return report.new_tokens or max(self.seq_len - report.context, report.ttr_window)

    @property
    def own_held_out(self) -> DataSettings | None:
        """The data that is held out, where it is not part of the training data."""
        return self.held_out if isinstance(self.held_out, DataSettings) else None

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        for key, settings in (("data", self.data), ("held_out", self.own_held_out)):
            given = settings.model_fields_set if settings is not None else set()
            for name, ours in _OURS.items():
                if name in given and not (key == "held_out" and name == "max_rows"):
                    raise ValueError(f"{key}.{name} follows from `{ours}` of the step: remove it there")
        if self.report.samples and not self.report.prompts and self.report.context > self.seq_len:
            raise ValueError(
                f"report.context is {self.report.context} tokens of a sequence, and seq_len {self.seq_len}: lower it"
            )
        return self

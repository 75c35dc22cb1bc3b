"""The tables `tune` and `probe` of `context-extension`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.batches import BatchSettings
from regraft.core.data.settings import Data, DataSettings
from regraft.core.measures.passkey import KEY
from regraft.core.recipe.references import OutputPath
from regraft.core.training.settings import TrainOptions, TrainSettings
from regraft.core.transformation import Params

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Depth = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Precision = Literal["auto", "float32", "bfloat16"]


class TuneSettings(TrainOptions):
    """The fine-tune behind the extension. Defaults: the 100-sample recipe of 2401.07004, appendix A.

    Args:
        data: long samples, of which answers are learnt, and of plain texts everything; a source, several, or a table.
            Samples longer than `target_length` are split, and packed ones restart positions, unless the table says
            otherwise.
        epochs: passes over the samples.
        steps: ends before the epochs do.
        batch_size: samples of a step; the last batch of an epoch is left out unless it is full.
        micro_batch: samples that are computed at once; the result is the same.
        shuffle: in every epoch another order.
        drop_last: false: the last batch of an epoch counts though it is not full.
        lr: the peak of the learning rate.
        ema: store the exponential moving average of the weights, with this decay.
        log: a file that gets a line of JSON for each step.
        tensorboard: a folder that gets TensorBoard events.

    Beside these, `TrainOptions`.
    """

    data: Data
    epochs: Count = 2
    steps: Count | None = None
    batch_size: Count = 32
    micro_batch: Count = 1
    shuffle: bool = True
    drop_last: bool = True
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2e-5
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    ema: Share | None = None
    save_every: Count = 1
    log: OutputPath | None = None
    tensorboard: OutputPath | None = None

    @model_validator(mode="after")
    def _one_answer_each(self) -> Self:
        if self.data.kind == "preference":
            raise ValueError("a fine-tune on long samples learns answers, not preferences: give chats or texts")
        return self

    def sequences(self, length: int) -> DataSettings:
        """How rows become sequences of at most `length` tokens."""
        given = self.data.model_fields_set
        ours = {"max_tokens": self.data.max_tokens or length, "too_long": "split", "restart_positions": self.data.pack}
        return self.data.model_copy(update={key: value for key, value in ours.items() if key not in given})

    def batching(self) -> BatchSettings:
        """How sequences become steps."""
        return BatchSettings(**{name: getattr(self, name) for name in BatchSettings.model_fields})

    def training(self, seed: int) -> TrainSettings:
        """How weights learn."""
        names = [name for name in TrainSettings.model_fields if name in type(self).model_fields]
        return TrainSettings(seed=seed, **{name: getattr(self, name) for name in names})


class ProbeSettings(Params):
    """What is measured of the model before and after.

    Args:
        entropy: attention entropy of every layer against the position, over `target_length` tokens.
        passkey: whether a key that stands somewhere in a long text is told again.
        samples: texts for the entropy, and for each length and depth of the passkey.
        lengths: of the passkey's texts, in tokens; None takes 25, 50, 75 and 100% of `target_length`.
        depths: where in the text the key stands: 0 at its beginning, 1 at its end.
        text: a file with the text around the key; None makes up English sentences.
        needle: the sentence with the key, written `{key}`.
        question: the end of the text, which the key continues.
        answers: the keys to draw from; None draws numbers of five digits.
        choices: keys among which the right one should be the likeliest.
        precision: of the model.
    """

    entropy: bool = True
    passkey: bool = True
    samples: Count = 3
    lengths: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1)] | None = None
    depths: Annotated[tuple[Depth, ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    text: Path | None = None
    needle: Text = "The secret number is {key}. Remember it: the secret number is {key}."
    question: Text = "What was the secret number? The secret number is"
    answers: tuple[Text, ...] | None = None
    choices: Annotated[int, Field(ge=2)] = 10
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if not (self.entropy or self.passkey):
            raise ValueError("nothing is measured: leave probe out, or switch entropy or passkey on")
        if KEY not in self.needle:
            raise ValueError(f"needle has no place for the key: write {KEY} where it goes")
        if KEY in self.question or self.question != self.question.rstrip():
            raise ValueError(f"question ends where the key follows: no {KEY} in it, and no space at its end")
        if self.answers is not None and len(set(self.answers)) < self.choices:
            count = len(set(self.answers))
            raise ValueError(f"answers are fewer than choices ({count}, {self.choices}): give more, or lower choices")
        return self

    def lengths_for(self, target: int) -> tuple[int, ...]:
        """The lengths of the passkey's texts."""
        return self.lengths or tuple(sorted({target * quarter // 4 for quarter in (1, 2, 3, 4)}))

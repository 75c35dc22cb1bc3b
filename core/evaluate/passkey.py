"""Passkey retrieval: does the model tell a key that stood somewhere in a long text, over length and depth?"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from regraft.core.evaluate.metric import Curve, Grid, Measured, Measuring, Metric
from regraft.core.evaluate.sample import Sample
from regraft.core.measures.passkey import KEY
from regraft.core.transformation import Params

if TYPE_CHECKING:
    from regraft.core.loaded import Loaded
    from regraft.core.measures.passkey import Answer

Text = Annotated[str, Field(min_length=1)]
Lengths = Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1)]
Depths = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]


class PasskeyParams(Params):
    """Prompts of a sweep."""

    lengths: Lengths | None = Field(
        None, description="Tokens of the prompts, with commas. Default: 25, 50, 75 and 100% of the model's window."
    )
    depths: Depths = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0), description="Where the key stands, with commas: 0 at the beginning, 1 at the end."
    )
    samples: Annotated[int, Field(ge=1)] = Field(3, description="Prompts of each length and depth.")
    text: Path | None = Field(None, description="A file with the text around the key. Default: made-up sentences.")
    needle: Text = Field(
        "The secret number is {key}. Remember it: the secret number is {key}.",
        description="The sentence with the key, written {key}.",
    )
    question: Text = Field(
        "What was the secret number? The secret number is", description="The end of the prompt, before the key."
    )
    answers: tuple[Text, ...] | None = Field(None, description="Keys to draw from. Default: numbers of five digits.")
    choices: Annotated[int, Field(ge=2)] = Field(10, description="Keys of which the right one should be likeliest.")

    @model_validator(mode="after")
    def _needle_and_question_fit(self) -> Self:
        if KEY not in self.needle:
            raise ValueError(f"needle has no place for the key: write {KEY} where it goes")
        if KEY in self.question or self.question != self.question.rstrip():
            raise ValueError(f"question ends where the key follows: no {KEY} in it, and no space at its end")
        if self.answers is not None and len(set(self.answers)) < self.choices:
            raise ValueError("answers are fewer than choices: give more, or lower choices")
        return self


class Passkey(Metric[PasskeyParams]):
    """The right key among others by log-probability, and in the greedy answer."""

    name = "passkey"
    summary = "Passkey retrieval over length and depth."
    figures = MappingProxyType(
        {
            "likeliest": "share of prompts whose key is the likeliest of `choices`; higher is better",
            "told": "share of prompts whose greedy answer holds the key; higher is better",
            "mean_rank": "mean rank of the right key, from 1; lower is better",
        }
    )
    Params = PasskeyParams

    def measure(self, subject: Loaded, params: PasskeyParams, measuring: Measuring) -> Measured:
        """One prompt at a time."""
        from regraft.core.evaluate.texts import window_of
        from regraft.core.measures.passkey import Passkeys, ask

        window = None if params.lengths else window_of(subject, None, measuring)
        lengths = params.lengths or tuple(sorted({max(16, (window or 0) * part // 4) for part in (1, 2, 3, 4)}))
        count = len(lengths) * len(params.depths) * params.samples
        measuring.tell(f"passkey: {count} prompts of {', '.join(map(str, lengths))} tokens")
        passkeys = Passkeys(subject.tokenizer, params, measuring.seed, "--task passkey: ")
        cells: dict[tuple[int, int], list[Answer]] = {
            (row, column): [
                ask(subject.model, subject.tokenizer, passkeys.prompt(length, depth, number))
                for number in range(params.samples)
            ]
            for row, length in enumerate(lengths)
            for column, depth in enumerate(params.depths)
        }
        answers = {
            f"{lengths[row]}/{params.depths[column]}/{number}": answer
            for (row, column), some in cells.items()
            for number, answer in enumerate(some)
        }
        samples = {
            "likeliest": Sample.mean({key: float(one.rank == 1) for key, one in answers.items()}),
            "told": Sample.mean({key: float(one.told) for key, one in answers.items()}),
            "mean_rank": Sample.mean({key: float(one.rank) for key, one in answers.items()}),
        }
        first = {cell: fmean(one.rank == 1 for one in some) for cell, some in cells.items()}
        table = [[first[row, column] for row in range(len(lengths))] for column in range(len(params.depths))]
        ticks = [f"{length}" for length in lengths], [f"{depth:.0%}" for depth in params.depths]
        by_length = [fmean(column) for column in zip(*table, strict=True)]
        return Measured(
            samples,
            {"prompts": count, "lengths": list(lengths), "depths": list(params.depths),
             "likeliest_by_depth_and_length": table, "chance": 1 / params.choices},
            [f"chance is {1 / params.choices:.4g} for likeliest"],
            {"likeliest by length": Curve(lengths, by_length, "length (tokens)", "share likeliest")},
            {"likeliest": Grid(table, "length (tokens)", "depth", *ticks)},
        )  # fmt: skip

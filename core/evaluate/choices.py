"""Classification and multiple choice: is the right option the likeliest?"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from regraft.core.evaluate.metric import Measured, Measuring, Metric
from regraft.core.evaluate.quantiles import quantiles
from regraft.core.evaluate.sample import Sample
from regraft.core.measures.choices import Normalise, read_choices, score_choices
from regraft.core.transformation import Params

if TYPE_CHECKING:
    from regraft.core.loaded import Loaded


class ChoicesParams(Params):
    """Questions, and how options are scored."""

    data: Path = Field(description="JSON lines (or .json, .csv, .parquet) of prompt, options and answer.")
    normalise: Normalise = Field(
        "none", description="What an option's log-probability is divided by: none, its tokens or its characters."
    )
    max_rows: Annotated[int, Field(ge=1)] | None = Field(None, description="Only the first so many questions.")


class Choices(Metric[ChoicesParams]):
    """Accuracy over questions whose options are scored by log-probability."""

    name = "choices"
    summary = "Accuracy on classification and multiple choice from JSON lines."
    figures = MappingProxyType(
        {
            "accuracy": "share of questions whose right option is the likeliest; higher is better",
            "log_prob": "mean log-probability of the right option among the options, in nats; higher is better",
        }
    )
    Params = ChoicesParams

    def check(self, params: ChoicesParams) -> None:
        """Read the questions."""
        read_choices(params.data)

    def measure(self, subject: Loaded, params: ChoicesParams, measuring: Measuring) -> Measured:
        """Score every option of every question."""
        choices = read_choices(params.data)[: params.max_rows]
        measuring.tell(f"choices: {len(choices)} questions")
        scored = score_choices(
            subject.model, subject.tokenizer, choices, batch_size=measuring.batch_size, normalise=params.normalise
        )
        right = {str(one.choice.place): float(one.correct) for one in scored}
        log_probs = {str(one.choice.place): one.answer_log_prob for one in scored}
        chance = sum(1 / len(one.options) for one in choices) / len(choices)
        return Measured(
            {"accuracy": Sample.mean(right), "log_prob": Sample.mean(log_probs)},
            {"questions": len(choices), "chance": chance},
            [f"chance is {chance:.4g} of {len(choices)} questions"],
            {"log-probability of the right option": quantiles(list(log_probs.values()), "log-probability (nats)")},
        )

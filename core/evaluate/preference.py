"""Preference accuracy: does the model find the preferred answer likelier than the other?"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from regraft.core.evaluate.metric import Measured, Measuring, Metric
from regraft.core.evaluate.quantiles import quantiles
from regraft.core.evaluate.sample import Sample
from regraft.core.transformation import Params

if TYPE_CHECKING:
    from regraft.core.data.settings import DataSettings
    from regraft.core.loaded import Loaded


class PreferenceParams(Params):
    """Pairs of answers."""

    data: tuple[str, ...] = Field(description="Data files of prompt, chosen and rejected, with commas between them.")
    max_rows: Annotated[int, Field(ge=1)] | None = Field(None, description="Only so many pairs, drawn by the seed.")

    def settings(self) -> DataSettings:
        """How the files are read."""
        from regraft.core.data.settings import DataSettings

        return DataSettings(source=self.data, kind="preference", max_rows=self.max_rows)


class Preference(Metric[PreferenceParams]):
    """Log-probabilities of whole answers, compared pair by pair."""

    name = "preference"
    summary = "Preference accuracy on pairs of answers: prompt, chosen, rejected."
    figures = MappingProxyType(
        {
            "accuracy": "share of pairs whose chosen answer is likelier, ties as halves; higher is better",
            "margin": "mean log-probability of the chosen answer minus that of the rejected, in nats; higher is better",
        }
    )
    Params = PreferenceParams

    def check(self, params: PreferenceParams) -> None:
        """Whether the files are there."""
        from regraft.core.data.load import check_sources

        check_sources(params.settings())

    def measure(self, subject: Loaded, params: PreferenceParams, measuring: Measuring) -> Measured:
        """Score both answers of every pair."""
        import torch

        from regraft.core.data.batches import Batches, BatchSettings
        from regraft.core.data.load import load_data
        from regraft.core.evaluate.texts import window_of
        from regraft.core.training.model import memory
        from regraft.core.training.objectives import answer_log_probs

        window = window_of(subject, None, measuring)
        data = load_data(params.settings(), subject.tokenizer, window=window, seed=measuring.seed)
        measuring.tell(f"preference: {len(data.examples)} pairs")
        batches = Batches(data.examples, BatchSettings(batch_size=1))
        margins: dict[str, float] = {}
        with torch.no_grad(), memory("measuring"):
            for start in range(0, len(data.examples), measuring.batch_size):
                indices = range(start, min(start + measuring.batch_size, len(data.examples)))
                chosen, rejected = answer_log_probs(subject.head, batches.gather(indices, subject.device))
                found = (chosen.double() - rejected.double()).tolist()
                margins |= {str(data.examples[index].place): value for index, value in zip(indices, found, strict=True)}
        right = {key: 0.5 if value == 0 else float(value > 0) for key, value in margins.items()}
        return Measured(
            {"accuracy": Sample.mean(right), "margin": Sample.mean(margins)},
            {"pairs": len(margins), "digest": data.digest},
            [f"chance is 0.5 of {len(margins)} pairs"],
            {"margin": quantiles(list(margins.values()), "log-probability of chosen over rejected (nats)")},
        )

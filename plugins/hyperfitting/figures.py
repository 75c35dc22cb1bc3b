"""What is measured before and after: loss and entropy on given text, and greedy continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from regraft.core.data.examples import Example
from regraft.core.errors import TransformationError
from regraft.core.measures.greedy import greedy
from regraft.core.measures.predictions import Predictions, predictions
from regraft.core.measures.tokens import longest_shared_runs, rate_of, type_token_ratio
from regraft.core.training.head import Head
from regraft.plugins.hyperfitting.data import Material
from regraft.plugins.hyperfitting.params import HyperfittingParams

_MEASURED = 128
"""Training sequences, at most, on which a model is measured outside of the training."""


@dataclass(frozen=True)
class Figures:
    """A model's figures.

    Args:
        training: on the first training sequences, at most 128.
        held_out: None where nothing is held out.
        continuations: token ids, one list for each context.
        ratios: type-token ratio of each.
        runs: the longest run of tokens that each shares with a training sequence.
        ngram: a run of so many is a citation.
    """

    training: Predictions
    held_out: Predictions | None
    continuations: Sequence[Sequence[int]]
    ratios: Sequence[float]
    runs: Sequence[int]
    ngram: int

    @property
    def type_token_ratio(self) -> float:
        """Mean over the continuations; there must be one."""
        return fmean(self.ratios)

    @property
    def citation_rate(self) -> float:
        """Share of the continuations that cite."""
        return rate_of(self.runs, self.ngram)

    def as_json(self) -> dict[str, Any]:
        """The figures by name."""
        figures: dict[str, Any] = {"training": self.training.as_json()}
        if self.held_out is not None:
            figures["held_out"] = self.held_out.as_json()
        if self.continuations:
            figures |= {
                "continuations": len(self.continuations),
                "type_token_ratio": self.type_token_ratio,
                "citation_rate": self.citation_rate,
                "longest_shared_run": max(self.runs),
            }
        return figures


def measure(
    model: Any,
    material: Material,
    contexts: Sequence[Sequence[int]],
    params: HyperfittingParams,
    *,
    precision: str,
    whose: str,
) -> Figures:
    """The figures of `model`, which is `whose`, such as `the base`.

    Raises:
        TransformationError: they are not finite.
        UsageError: a context and its continuation are longer than the window.
    """
    head = Head.of(model)
    size = params.micro_batch or params.batch_size

    def on(sequences: Sequence[Example]) -> Predictions:
        return _finite(predictions(head, sequences, batch_size=size, precision=precision), whose)

    training = on(material.training[:_MEASURED])
    held_out = on(material.held_out) if material.held_out else None
    continuations = greedy(model, contexts, params.new_tokens, precision=precision)
    runs = longest_shared_runs(continuations, [one.ids for one in material.training]) if contexts else []
    ratios = [type_token_ratio(ids, params.report.ttr_window) for ids in continuations]
    return Figures(training, held_out, continuations, ratios, runs, params.report.citation_ngram)


def _finite(found: Predictions, whose: str) -> Predictions:
    if not found.finite:
        raise TransformationError(
            f"the loss of {whose} is not finite, or too large to be a number",
            where="held-out and training sequences",
            expected="a finite loss",
            found=f"loss {found.loss}, entropy {found.entropy}",
            remedy="lower lr, or set clip_norm"
            if whose != "the base"
            else "check the base: its weights may be damaged",
        )
    return found

"""What a run has to say: figures for the lock file, notes for the user, plots and pages for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from regraft.core.checkpoint import FileRef
from regraft.core.measures.tokens import type_token_ratio
from regraft.core.training.loop import Report
from regraft.core.training.report import report_metrics, training_reports
from regraft.plugins.hyperfitting.data import Material
from regraft.plugins.hyperfitting.figures import Figures
from regraft.plugins.hyperfitting.params import HyperfittingParams
from regraft.plugins.hyperfitting.samples import samples_page


@dataclass(frozen=True)
class Outcome:
    """A run that is over.

    Args:
        params: of the step.
        material: what it read.
        contexts: token ids that were continued.
        training: what the loop did.
        epoch_steps: steps of an epoch.
        before: figures of the base.
        after: of what is stored.
    """

    params: HyperfittingParams
    material: Material
    contexts: Sequence[Sequence[int]]
    training: Report
    epoch_steps: int
    before: Figures
    after: Figures

    def metrics(self) -> dict[str, Any]:
        """JSON values; no times."""
        window = self.params.report.ttr_window
        return {
            **self.material.summary,
            **report_metrics(self.training),
            "last_epoch_loss": fmean(self.training.losses[-self.epoch_steps :]),
            "strength": self.params.strength,
            "type_token_ratio_of_training": fmean(type_token_ratio(one.ids, window) for one in self.material.training),
            "before": self.before.as_json(),
            "after": self.after.as_json(),
        }

    def reports(self, tokenizer: Any) -> dict[str, FileRef]:
        """The plot, the losses, and a page of continuations if there are any."""
        held_out = {}
        if self.before.held_out is not None and self.after.held_out is not None:
            held_out = {0: self.before.held_out.loss, self.training.steps: self.after.held_out.loss}
        reports = training_reports(self.training, "hyperfitting", held_out=held_out)
        if self.contexts:
            page = samples_page(tokenizer, self.contexts, self.before, self.after, self.params)
            reports["samples.md"] = FileRef(data=page)
        return reports

    def notes(self) -> list[str]:
        """Sentences for the user."""
        return [self._training(), *self._held_out(), self._continuations()]

    def _training(self) -> str:
        reached = f"stopped below {self.params.stop_loss:g}" if self.training.stopped else "all epochs"
        losses = f"{self.before.training.loss:.3f} -> {self.after.training.loss:.3f}"
        strength = "" if self.params.strength == 1 else f" at strength {self.params.strength:g}"
        return f"{self.training.steps} steps, {reached}: loss on training sequences {losses}{strength}"

    def _held_out(self) -> list[str]:
        before, after = self.before.held_out, self.after.held_out
        if before is None or after is None:
            return []
        if after.loss > before.loss:
            verdict = "perplexity gets worse by design; judge the model by the text it writes"
        else:
            verdict = "perplexity did not get worse, so this is not hyperfitting yet: more epochs or a higher lr"
        losses = f"held-out perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}"
        return [f"{losses}, entropy {before.entropy:.2f} -> {after.entropy:.2f} nats: {verdict}"]

    def _continuations(self) -> str:
        before, after = self.before, self.after
        if not self.contexts:
            return "no continuations were measured: nothing is held out for them, and report.prompts is empty"
        return (
            f"greedy text: type-token ratio {before.type_token_ratio:.3f} -> {after.type_token_ratio:.3f}, citation "
            f"rate {before.citation_rate:.2f} -> {after.citation_rate:.2f} ({after.ngram} tokens)"
        )

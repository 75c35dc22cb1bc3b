"""The parts of the step that need a model: measure, fine-tune, measure again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Patch, overlay
from regraft.core.transformation import Run
from regraft.plugins.context_extension.params import ContextExtensionParams
from regraft.plugins.context_extension.probe import Probe
from regraft.plugins.context_extension.tune import read_samples, tune


def fit(checkpoint: Checkpoint, patch: Patch, params: ContextExtensionParams, run: Run) -> Patch:
    """The patch of an extension, with what its fine-tune learns and what its probe measures.

    Args:
        checkpoint: before the extension.
        patch: the extension.
        params: with `tune`, `probe` or both.
        run: of the step.

    Raises:
        RegraftError: see `ContextExtension.apply`.
    """
    tokenizer = run.tokenizer(checkpoint)
    window = int(patch.metrics["original_length"])
    samples = None
    if params.tune is not None:  # before anything that takes long
        seed = run.seed_for("tune data")
        samples = read_samples(params.tune, tokenizer, window=window, target=params.target_length, seed=seed)
    probe = _probe(params, tokenizer, window, run)
    if probe is not None:
        probe.measure("before", checkpoint)
    if params.tune is not None and samples is not None:
        extended = overlay(checkpoint, patch, by=run.step)
        patch = _joined(patch, "tune", tune(extended, patch, params.tune, samples, run))
    if probe is not None:
        probe.measure("after", overlay(checkpoint, patch, by=run.step), patch)
        measured = Patch(metrics=probe.figures(), notes=tuple(probe.notes()), reports=probe.reports())
        patch = _joined(patch, "probe", measured)
    return patch


def _probe(params: ContextExtensionParams, tokenizer: Any, window: int, run: Run) -> Probe | None:
    settings = params.probing
    return None if settings is None else Probe(settings, tokenizer, window, params.target_length, run)


def _joined(patch: Patch, name: str, more: Patch) -> Patch:
    return replace(
        patch,
        edits={**patch.edits, **more.edits},
        metrics={**patch.metrics, name: more.metrics},
        notes=(*patch.notes, *more.notes),
        reports={**patch.reports, **more.reports},
    )

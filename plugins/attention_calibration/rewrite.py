"""Plan and apply: the export, of heads that are given or that the search finds."""

from __future__ import annotations

from dataclasses import replace

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Outline, Patch
from regraft.core.training.footprint import training_bytes
from regraft.core.transformation import Run
from regraft.plugins.attention_calibration.aim import Aim
from regraft.plugins.attention_calibration.export import LOADING, export
from regraft.plugins.attention_calibration.params import AttentionCalibrationParams

_TOKENS = 256
"""Of a question, for the memory that the plan names."""


def outline_of(checkpoint: Checkpoint, params: AttentionCalibrationParams) -> Outline:
    """What the patch will change; how long the modeling file is depends on the heads that are found.

    Raises:
        RegraftError: as `Aim.of`.
    """
    aim = Aim.of(checkpoint, params)
    outline = Outline.of(export(checkpoint, aim.family, params, aim.heads or ()))
    if aim.heads is not None:
        return replace(outline, notes=(_given(aim), LOADING))
    searched = f"heads are searched for in {len(aim.layers)} of {aim.num_layers} layers, and known after the run"
    return replace(
        outline,
        files=dict.fromkeys(outline.files),
        notes=(searched, *_window_notes(aim), LOADING),
        workspace_bytes=training_bytes(checkpoint, 0, tokens=params.batch_size * _TOKENS),
    )


def patch_of(checkpoint: Checkpoint, params: AttentionCalibrationParams, run: Run) -> Patch:
    """The patch, after the search if there is one.

    Raises:
        RegraftError: as `Aim.of` and the search.
    """
    aim = Aim.of(checkpoint, params)
    if aim.heads is not None:
        patch = export(checkpoint, aim.family, params, aim.heads)
        return replace(patch, notes=(_given(aim), LOADING), metrics={"heads": [list(head) for head in aim.heads]})
    from regraft.plugins.attention_calibration.report import metrics, notes, reports
    from regraft.plugins.attention_calibration.search import search

    found = search(checkpoint, params, aim, run)
    patch = export(checkpoint, aim.family, params, found.heads)
    return replace(
        patch,
        notes=(*notes(found), *_window_notes(aim), LOADING),
        metrics=metrics(found),
        reports=reports(found, aim),
    )


def _given(aim: Aim) -> str:
    assert aim.heads is not None
    return f"{len(aim.heads)} of {aim.num_layers * aim.num_heads} heads are calibrated, as given"


def _window_notes(aim: Aim) -> tuple[str, ...]:
    if not aim.windowed:
        return ()
    return (f"layers with a sliding window are not searched: {', '.join(map(str, sorted(aim.windowed)))}",)

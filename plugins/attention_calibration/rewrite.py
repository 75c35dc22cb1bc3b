"""Plan and apply: the export, of heads that are given or that the search finds."""

from __future__ import annotations

from dataclasses import replace

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.patch import Outline, Patch
from regraft.core.training.footprint import training_bytes
from regraft.core.transformation import Run
from regraft.plugins.attention_calibration.aim import Aim
from regraft.plugins.attention_calibration.export import ACT, LOADING, export
from regraft.plugins.attention_calibration.params import AttentionCalibrationParams

_TOKENS = 256
"""Of a question, for the memory that the plan names."""


def outline_of(checkpoint: Checkpoint, params: AttentionCalibrationParams) -> Outline:
    """What the patch will change; of a search, if it finds heads, with the longest table that there can be.

    Raises:
        RegraftError: as `Aim.of`.
    """
    aim = Aim.of(checkpoint, params)
    if aim.heads is not None:
        return replace(Outline.of(export(checkpoint, aim.family, params, aim.heads)), notes=(_given(aim), LOADING))
    every = [(layer, head) for layer in aim.layers for head in range(aim.num_heads)]
    searched = f"heads are searched for in {len(aim.layers)} of {aim.num_layers} layers, and known after the run"
    return replace(
        Outline.of(export(checkpoint, aim.family, params, every)),
        exact=False,
        undecided={CONFIG: frozenset({ACT})},
        or_nothing=True,
        notes=(searched, "if no head is worth calibrating, nothing changes", *_window_notes(aim), LOADING),
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
    patch = export(checkpoint, aim.family, params, found.heads) if found.heads else Patch()
    return replace(
        patch,
        notes=(*notes(found), *_window_notes(aim), *([LOADING] if found.heads else [])),
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

"""Plan and apply. The plan imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Edit, Outline, Patch, overlay
from regraft.core.shape_operations import Constant
from regraft.core.sparse_operations import Runs, ZeroLowest
from regraft.core.tensors import LazyTensor
from regraft.core.training.footprint import model_bytes
from regraft.core.transformation import Run
from regraft.plugins.prune.params import PruneParams
from regraft.plugins.prune.places import Matrix, Places, places_of

if TYPE_CHECKING:
    import torch


def outline(checkpoint: Checkpoint, params: PruneParams) -> Outline:
    """What the step changes: exact, although Wanda's norms have no values yet. Raises as `Prune.plan`."""
    places = places_of(checkpoint, params)
    edits = {**_skips(checkpoint, places), **_edits(checkpoint, places, {})}
    notes = _skip_notes(places)
    if params.prunes:
        notes += (_planned(places, params),)
    memory = _memory(checkpoint, params) if params.prunes else 0
    return replace(Outline.of(Patch(edits=edits)), notes=notes, workspace_bytes=memory)


def prune(checkpoint: Checkpoint, params: PruneParams, run: Run) -> Patch:
    """The patch. Raises as `Prune.apply`."""
    places = places_of(checkpoint, params)
    skips = Patch(edits=_skips(checkpoint, places), notes=_skip_notes(places))
    if places.skipped:
        skips = replace(skips, metrics={"skipped_ffn": list(places.skipped)})
    if not params.prunes:
        return skips
    from regraft.core.tensors import MemoryTensor
    from regraft.plugins.prune import report
    from regraft.plugins.prune.masks import applied_norms, count

    found: Mapping[str, Mapping[str, torch.Tensor]] = {}
    data = {}
    if params.score == "wanda":
        from regraft.plugins.prune.calibrate import calibrate

        seen = overlay(checkpoint, skips, by=run.step) if places.skipped else checkpoint
        calibration = calibrate(seen, places.architecture, places.matrices, params, run)
        found = calibration.norms
        data = {"data": {task: dataset.summary() for task, dataset in calibration.data.items()}}
    mean = params.combine == "mean"
    masks = count(checkpoint, places, found, mean=mean, keep_bits=params.masks)
    norms = {
        tensor: tuple(
            MemoryTensor(f"norm {number}", norm)
            for number, norm in enumerate(applied_norms({task: own[tensor] for task, own in found.items()}, mean))
        )
        for tensor in places.by_tensor()
    }
    return replace(
        skips,
        edits={**skips.edits, **_edits(checkpoint, places, norms)},
        metrics={**skips.metrics, **report.metrics(masks), **data},
        notes=(*skips.notes, *report.notes(masks, params.combine)),
        reports=report.reports(masks, places),
    )


def _skips(checkpoint: Checkpoint, places: Places) -> dict[str, Edit]:
    specs = {name: checkpoint.specs[name] for name in places.silenced()}
    return {name: Edit(spec, Constant(spec.shape)) for name, spec in specs.items()}


def _edits(checkpoint: Checkpoint, places: Places, norms: Mapping[str, tuple[LazyTensor, ...]]) -> dict[str, Edit]:
    return {
        tensor: Edit(
            checkpoint.specs[tensor],
            ZeroLowest(
                tensor,
                places.sparsity,
                tuple(dict.fromkeys(_runs(matrix) for matrix in matrices)),
                norms.get(tensor, ()),
                transposed=matrices[0].slot.transposed,
            ),
        )
        for tensor, matrices in places.by_tensor().items()
    }


def _runs(matrix: Matrix) -> Runs:
    """Experts that one tensor stacks have the same rows each."""
    return tuple((run.start, run.stop) for run in matrix.slot.rows)


def _memory(checkpoint: Checkpoint, params: PruneParams) -> int:
    """Of the model that runs; else of the largest tensor with its scores and masks."""
    if params.score == "wanda":
        return model_bytes(checkpoint) // (2 if params.dtype == "bfloat16" else 1)
    return 16 * max(spec.numel for spec in checkpoint.specs.values())


def _planned(places: Places, params: PruneParams) -> str:
    total = sum(matrix.shape[0] * matrix.shape[1] for matrix in places.matrices)
    zeros = sum(places.sparsity.count(*matrix.shape) for matrix in places.matrices)
    shared = params.tasks is not None and params.combine == "intersection"
    bound = "at most " if shared else ""
    return f"{bound}{zeros:,} of {total:,} weights of {len(places.matrices)} matrices become 0, by {params.score}"


def _skip_notes(places: Places) -> tuple[str, ...]:
    if not places.skipped:
        return ()
    layers = ", ".join(map(str, places.skipped))
    return (f"the MLPs of layers {layers} are switched off by zeros, which makes the model neither smaller nor faster",)

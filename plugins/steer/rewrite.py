"""From vectors, read or measured, to the patch. The plan imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.data.load import check_sources
from regraft.core.errors import RegraftError
from regraft.core.host import host
from regraft.core.operations import Value
from regraft.core.patch import Edit, Outline, Patch
from regraft.core.residual_bias import Offset, bake_residual_biases
from regraft.core.tensors import PromisedTensor
from regraft.core.training.footprint import model_bytes
from regraft.core.transformation import Run
from regraft.plugins.steer.params import SteerParams
from regraft.plugins.steer.places import Place, places_of
from regraft.plugins.steer.vectors import read_vectors


def check(params: SteerParams) -> None:
    """Refuse prompts that are not there.

    Raises:
        UsageError: a path that leads nowhere, or a folder without data.
    """
    for settings in (params.positive, params.negative):
        if settings is not None:
            check_sources(settings)


def outline(checkpoint: Checkpoint, params: SteerParams) -> Outline:
    """What the step changes: exact, although computed vectors have no values yet.

    Raises:
        InputError, UsageError, Unsupported: as `read_vectors`, `places_of` and `bake_residual_biases`.
    """
    if params.vectors is not None:
        return Outline.of(_from_file(checkpoint, params))
    architecture = _architecture(checkpoint)
    places = places_of(params, architecture)
    patch = _promised(checkpoint, architecture, params, places)
    what = f"{len(places)} vector{'s' if len(places) > 1 else ''}"
    if isinstance(params.heads, int):
        what = f"{params.heads} of {what}, those that tell the prompts apart best,"
    notes = (f"{what} at {params.site}, computed from prompts when the step runs", *patch.notes)
    size = model_bytes(checkpoint) // (2 if params.dtype == "bfloat16" else 1)
    return replace(Outline.of(patch), notes=notes, workspace_bytes=size)


def steer(checkpoint: Checkpoint, params: SteerParams, run: Run) -> Patch:
    """The patch.

    Raises:
        RegraftError: see `Steer.apply`.
    """
    if params.vectors is not None:
        return _from_file(checkpoint, params)
    from regraft.core.tensors import MemoryTensor
    from regraft.plugins.steer import report
    from regraft.plugins.steer.fit import measure

    architecture = _architecture(checkpoint)
    places = places_of(params, architecture)
    found = measure(checkpoint, architecture, params, places, run)
    offsets = [
        place.offset(MemoryTensor(place.name, found.places[place].vector), params.strength) for place in found.chosen
    ]
    patch = bake_residual_biases(checkpoint, architecture, offsets, mode=params.mode)
    promised = _promised(checkpoint, architecture, params, places)
    kept = {name: Edit(edit.spec, Value(checkpoint.tensor(name)))
            for name, edit in promised.edits.items() if name not in patch.edits}  # fmt: skip
    return replace(
        patch,
        edits={**kept, **patch.edits},
        metrics=report.metrics(found),
        notes=(_added(len(offsets), params), *report.notes(found, params), *patch.notes),
        reports=report.reports(found, architecture, params),
    )


def _from_file(checkpoint: Checkpoint, params: SteerParams) -> Patch:
    """One lazy edit for each bias that takes up a vector, made from headers, configs and the vectors alone."""
    assert params.vectors is not None
    offsets = read_vectors(params.vectors, params.strength)
    architecture = _architecture(checkpoint)
    for offset in offsets:
        try:
            offset.check(architecture)
        except RegraftError as error:
            error.where = f"{params.vectors}: {error.where}"
            raise
    patch = bake_residual_biases(checkpoint, architecture, offsets, mode=params.mode)
    return replace(patch, notes=(_added(len(offsets), params), *patch.notes), metrics={"vectors": len(offsets)})


def _promised(
    checkpoint: Checkpoint, architecture: Architecture, params: SteerParams, places: Sequence[Place]
) -> Patch:
    """The patch for all `places`, with vectors that have no values."""
    offsets: list[Offset] = [
        place.offset(PromisedTensor(place.spec(architecture)), params.strength) for place in places
    ]
    return bake_residual_biases(checkpoint, architecture, offsets, mode=params.mode)


def _architecture(checkpoint: Checkpoint) -> Architecture:
    return architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())


def _added(count: int, params: SteerParams) -> str:
    origin = "computed from prompts" if params.vectors is None else f"of {params.vectors.name}"
    times = f", times {params.strength:g}" if params.strength != 1.0 else ""
    return f"{count} vector{'s' if count > 1 else ''} {origin} added{times}"

"""From a file of vectors to the patch."""

from __future__ import annotations

from dataclasses import replace

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import RegraftError
from regraft.core.host import host
from regraft.core.patch import Patch
from regraft.core.residual_bias import bake_residual_biases
from regraft.plugins.steer.params import SteerParams
from regraft.plugins.steer.vectors import read_vectors


def steer_patch(checkpoint: Checkpoint, params: SteerParams) -> Patch:
    """The patch that adds the vectors; made from headers, configs and the vectors alone.

    Raises:
        InputError, UsageError, Unsupported: as `read_vectors` and `bake_residual_biases`.
    """
    offsets = read_vectors(params.vectors, params.strength)
    architecture = architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())
    for offset in offsets:
        try:
            offset.check(architecture)
        except RegraftError as error:
            error.where = f"{params.vectors}: {error.where}"
            raise
    patch = bake_residual_biases(checkpoint, architecture, offsets, mode=params.mode)
    count = f"{len(offsets)} vector{'s' if len(offsets) > 1 else ''} of {params.vectors.name}"
    times = f", times {params.strength:g}" if params.strength != 1.0 else ""
    return replace(patch, notes=(f"{count} added{times}", *patch.notes), metrics={"vectors": len(offsets)})

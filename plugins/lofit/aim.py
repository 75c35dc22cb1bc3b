"""What a step aims at, from headers and parameters alone: which layers and heads may learn, and how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.head_file import Head, HeadFile, read_heads_of
from regraft.core.host import host
from regraft.core.layers import layers_of
from regraft.plugins.lofit.math import head_count
from regraft.plugins.lofit.params import DEFAULT_SHARE, LofitParams


@dataclass(frozen=True)
class Aim:
    """Where offsets may go.

    Args:
        architecture: of the checkpoint.
        layers: whose heads may be chosen; those of the file's heads, where a file names them.
        units: heads of a layer, or key-value heads.
        count: how many are chosen.
        named: those of a file, the best first.
        named_scores: their scores and those of others, if the file has them.
    """

    architecture: Architecture
    layers: Sequence[int]
    units: int
    count: int
    named: Sequence[Head] = ()
    named_scores: Mapping[Head, float] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, params: LofitParams) -> Aim:
        """The aim of `params`.

        Raises:
            UsageError: there are no such layers or heads, or too few.
            InputError: the file of heads is not valid.
            Unsupported: it is not known where the model keeps o_proj.
        """
        architecture = architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())
        layers = layers_of(params.layers, architecture.num_layers)
        for layer in layers:
            architecture.slot("o_proj", layer)
        units = architecture.num_heads if params.site == "head" else architecture.num_kv_heads
        total = architecture.num_layers * units
        if params.heads_file is None:
            count = head_count(params.heads or DEFAULT_SHARE, total, len(layers) * units)
            return cls(architecture, layers, units, count)
        file = read_heads_of(params.heads_file, architecture.num_layers, units, site=params.site)
        inside = [head for head in file.heads if head[0] in layers]
        count = head_count(params.heads or max(1, len(inside)), total, len(inside))
        named = inside[:count]
        return cls(architecture, sorted({layer for layer, _ in named}), units, count, named, _scores(file, units))


def _scores(file: HeadFile, units: int) -> dict[Head, float]:
    return {
        (layer, unit): float(score)
        for layer, row in enumerate(file.scores)
        for unit, score in enumerate(row[:units])
        if score is not None
    }

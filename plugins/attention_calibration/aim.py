"""What a step aims at, from headers and parameters alone: the heads that are given, or where to look for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported, UsageError
from regraft.core.head_file import Head, check_heads, read_heads_of
from regraft.core.host import host
from regraft.core.layers import layers_of
from regraft.plugins.attention_calibration.families import Family, family_of, windowed_layers
from regraft.plugins.attention_calibration.params import AttentionCalibrationParams


@dataclass(frozen=True)
class Aim:
    """What will be calibrated.

    Args:
        family: of the model.
        num_layers, num_heads: of the model.
        heads: those given; None where they are searched for.
        layers: for the search, without those that have a sliding window.
        windowed: layers that were left out for their window.
    """

    family: Family
    num_layers: int
    num_heads: int
    heads: tuple[Head, ...] | None
    layers: Sequence[int]
    windowed: frozenset[int]

    @classmethod
    def of(cls, checkpoint: Checkpoint, params: AttentionCalibrationParams) -> Aim:
        """The aim of `params`.

        Raises:
            Unsupported: the family's attention cannot be calibrated, or that of a layer given or of all layers.
            UsageError: there are no such layers or heads, or the table is of another model.
            InputError: the table is not valid.
        """
        family = family_of(checkpoint)
        architecture = architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())
        layers, heads = architecture.num_layers, architecture.num_heads
        windowed = windowed_layers(checkpoint.config, family, layers)
        if params.heads is None:
            return cls(family, layers, heads, None, _searched(params, layers, windowed), windowed)
        given = _given(params.heads, layers, heads)
        for layer, _ in given:
            if layer in windowed:
                raise _windowed("heads", f"layer {layer}")
        return cls(family, layers, heads, given, (), windowed)


def _given(heads: tuple[Head, ...] | Path, num_layers: int, num_heads: int) -> tuple[Head, ...]:
    if not isinstance(heads, Path):
        check_heads(heads, num_layers, num_heads, where="heads")
        if len(set(heads)) < len(heads):
            raise UsageError("a head is named twice", where="heads", found=sorted(heads), remedy="name each once")
        return heads
    return read_heads_of(heads, num_layers, num_heads).heads


def _searched(params: AttentionCalibrationParams, num_layers: int, windowed: frozenset[int]) -> list[int]:
    asked = layers_of(params.layers, num_layers)
    layers = [layer for layer in asked if layer not in windowed]
    if not layers:
        raise _windowed("layers", "every layer that is searched")
    return layers


def _windowed(where: str, which: str) -> Unsupported:
    return Unsupported(
        f"{which} has a sliding window, whose keys leave the cache, and sums with them",
        where=where,
        expected="layers that see all keys",
        found="a sliding window in config.json",
        remedy="name other layers, or set sliding_window to null if the model may look back further",
    )

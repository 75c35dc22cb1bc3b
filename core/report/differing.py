"""The facts of the page about two checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.diff import Difference
from regraft.core.report.comparison import Changes, measured_changes


@dataclass(frozen=True)
class Side:
    """One of two checkpoints, from its headers."""

    name: str
    model_type: str
    parameters: int
    nbytes: int
    tensors: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Differing:
    """Everything about two checkpoints, as the template wants it."""

    before: Side
    after: Side
    equal: bool
    changes: Changes


def gather(found: Difference, before: Checkpoint, after: Checkpoint, families: Sequence[Any] = ()) -> Differing:
    """Gather the facts of a comparison.

    Args:
        found: by `compare_checkpoints(before, after)`.
        before, after: the checkpoints.
        families: rows of plugins for `architecture_of`.
    """
    return Differing(_side(before), _side(after), not found, measured_changes(found, before, after, families))


def _side(checkpoint: Checkpoint) -> Side:
    specs = checkpoint.specs.values()
    return Side(
        short_name(checkpoint.label), str(checkpoint.config.get("model_type", "")), sum(spec.numel for spec in specs),
        sum(spec.nbytes for spec in specs), len(specs), dict(sorted(Counter(spec.dtype for spec in specs).items())),
    )  # fmt: skip


def short_name(label: str) -> str:
    """What the user wrote, without the folders above an absolute path."""
    return Path(label).name if label.startswith(("/", "~", ".")) and Path(label).name.strip(".") else label

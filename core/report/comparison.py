"""Two checkpoints compared for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.diff import Difference
from regraft.core.report.changes import Change, change_map, counted, from_difference, listed
from regraft.core.report.heat_map import HeatMap
from regraft.core.report.keys import KeyChange, key_changes
from regraft.core.report.places import Place, places_of
from regraft.core.report.vocabulary import Vocabularies, vocabularies

_WHAT = "What became of each weight"


@dataclass(frozen=True)
class Changes:
    """What has changed, as a page shows it.

    Args:
        measured: whether the sizes of changes are known.
        counts: words, number and bytes of each kind of change.
        heat_map: by layer and role; None where no tensor in a layer has changed.
        listed: changed tensors, the largest change first.
        more: how many changed tensors are not listed.
        keys: JSON files with their changed keys.
        vocabulary: how the tokenizers differ.
        files: other files that differ, and how.
    """

    measured: bool
    counts: Sequence[tuple[str, int, int]]
    heat_map: HeatMap | None
    listed: Sequence[Change]
    more: int
    keys: Sequence[tuple[str, Sequence[KeyChange]]] = ()
    vocabulary: Vocabularies | None = None
    files: Sequence[tuple[str, str]] = ()


def measured_changes(found: Difference, before: Checkpoint, after: Checkpoint, families: Sequence[Any] = ()) -> Changes:
    """What `compare_checkpoints` has found between two checkpoints.

    Args:
        found: by `compare_checkpoints(before, after)`.
        before, after: the checkpoints.
        families: rows of plugins for `architecture_of`.
    """
    names = list(dict.fromkeys([*after.specs, *before.specs]))
    sizes = {name: spec.nbytes for name, spec in [*before.specs.items(), *after.specs.items()]}
    places = _both(before, after, names, families)
    changes = from_difference(found, names, after.tensors)
    rows, more = listed(changes)
    return Changes(
        True, counted(changes, sizes), change_map(changes, places, title=_WHAT), rows, more,
        key_changes(found, before, after), vocabularies(before, after), list(found.files.items()),
    )  # fmt: skip


def _both(before: Checkpoint, after: Checkpoint, names: Sequence[str], families: Sequence[Any]) -> dict[str, Place]:
    """Places as the later checkpoint has them; of tensors that only the earlier one has, as that has them."""
    later = places_of(after.config, list(after.specs), families)
    earlier = places_of(before.config, list(before.specs), families)
    merged = later | {name: place for name, place in earlier.items() if name not in later}
    return {name: merged[name] for name in [*later, *(name for name in names if name not in later)]}

"""What became of the deltas, for the lock file and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.delta_report import Delta, reports, rounded, warnings
from regraft.core.delta_report import deltas as deltas_of
from regraft.core.patch import Edit
from regraft.plugins.vlora.places import Place

if TYPE_CHECKING:
    from regraft.plugins.vlora.rewrite import Aim

__all__ = ["deltas", "metrics", "reports", "warnings"]

SAMPLE = 1 << 20


def deltas(checkpoint: Checkpoint, places: Sequence[Place], edits: Mapping[str, Edit]) -> list[Delta]:
    """The deltas of `places`; those of type m are stored as they are, and not among them."""
    return deltas_of(checkpoint, {place.spec.name: edits[place.spec.name] for place in places}, sample=SAMPLE)


def metrics(aim: Aim, found: Sequence[Delta]) -> dict[str, Any]:
    """For the lock file."""
    sight = aim.sight
    facts = {
        "images": [] if sight is None else list(sight.names),
        "generator": aim.label,
        "parameters": aim.settings.num_parameters,
        "rank": aim.settings.rank,
        "types": aim.types,
        "layers": list(aim.settings.active_layers),
        "scale": aim.scale,
        "tensors": len(found),
    }
    tower = aim.eyes if sight is None else sight.tower
    if tower is not None:
        facts["vision"] = {"digest": tower.checkpoint.digest, "select_layer": tower.select_layer}
    if found:
        facts["lost"] = rounded(max(one.lost for one in found))
    return facts

"""What became of the deltas: how large they are, and how much of them the weights' dtype can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.jsonio import dump
from regraft.core.low_rank import LowRankDelta, realised
from regraft.core.patch import Edit
from regraft.core.tensors import LazyTensor
from regraft.plugins.vlora.places import Place

if TYPE_CHECKING:
    import torch

    from regraft.plugins.vlora.rewrite import Aim

SAMPLE, BLOCKS = 1 << 20, 8
"""Elements of a tensor that are looked at, about, and in how many pieces: a twentieth of a second for each tensor."""

LOST = 0.1
"""From here on the user is told."""


@dataclass(frozen=True)
class Delta:
    """The delta of one tensor.

    Args:
        name: of the tensor.
        rank: at most.
        size: ‖ΔW‖ / ‖W‖, over the rows looked at.
        lost: ‖round(W + ΔW) - W - ΔW‖ / ‖ΔW‖, over the rows looked at, if it is merged in the tensor's own dtype.
    """

    name: str
    rank: int
    size: float
    lost: float


def deltas(checkpoint: Checkpoint, places: Sequence[Place], edits: Mapping[str, Edit]) -> list[Delta]:
    """The deltas of `places`; those of type m are stored as they are, and not among them."""
    found = []
    for place in places:
        operation = edits[place.spec.name].operation
        assert isinstance(operation, LowRankDelta)
        found.append(_delta(checkpoint, place, operation))
    return found


def _delta(checkpoint: Checkpoint, place: Place, operation: LowRankDelta) -> Delta:
    left, right = operation.left.load(), operation.right.load()
    weight, left = _sample(checkpoint.tensor(place.spec.name), left)
    size = abs(operation.scale) * _norm(left, right) / max(float(weight.double().norm()), 1e-300)
    return Delta(place.spec.name, place.total_rank, size, realised(weight, left, right, operation.scale))


def _sample(tensor: LazyTensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a weight and of its left factor: all of a small tensor, of a large one blocks from end to end."""
    import torch

    total = tensor.spec.rows
    rows = max(2, SAMPLE // BLOCKS // tensor.spec.shape[1])
    if rows * BLOCKS >= total or not tensor.row_local:
        return tensor.load(), left
    read = tensor.open()
    starts = [number * (total - rows) // (BLOCKS - 1) for number in range(BLOCKS)]
    pieces = [(read(start, start + rows), left[start : start + rows]) for start in starts]
    weights, lefts = zip(*pieces, strict=True)
    return torch.cat(weights), torch.cat(lefts)


def _norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """‖L R‖ from two Gram matrices, float64."""
    left, right = left.double(), right.double()
    square = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0)
    return float(square.sqrt())


def warnings(found: Sequence[Delta]) -> list[str]:
    """What a user should know of rounding."""
    worst = max(found, key=lambda one: one.lost, default=None)
    if worst is None or worst.lost <= LOST:
        return []
    count = sum(one.lost > LOST for one in found)
    note = (
        f"rounding takes more than {LOST:.0%} of the delta of {count} of {len(found)} tensors, {worst.lost:.0%} of "
        f"{worst.name}: they are too small beside the weights; write the output in a wider dtype, or as an adapter"
    )
    return [note]


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
    if sight is not None and sight.tower is not None:
        facts["vision"] = {"digest": sight.tower.checkpoint.digest, "select_layer": sight.tower.select_layer}
    if found:
        facts["lost"] = _rounded(max(one.lost for one in found))
    return facts


def reports(found: Sequence[Delta]) -> dict[str, FileRef]:
    """`deltas.json`: size and loss of every delta; empty without low-rank deltas."""
    if not found:
        return {}
    rows = {one.name: {"rank": one.rank, "size": _rounded(one.size), "lost": _rounded(one.lost)} for one in found}
    return {"deltas.json": FileRef(data=dump(rows))}


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")

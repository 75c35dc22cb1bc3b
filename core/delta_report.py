"""What becomes of low-rank deltas: how large they are, and how much of them the weights' dtype can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.jsonio import dump
from regraft.core.low_rank import LowRankDelta, realised
from regraft.core.patch import Edit
from regraft.core.tensors import LazyTensor

if TYPE_CHECKING:
    import torch

BLOCKS = 8
"""Pieces of a tensor that are looked at, from end to end."""

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
        stochastic: whether it is rounded stochastically: what is lost is then noise about the delta.
    """

    name: str
    rank: int
    size: float
    lost: float
    stochastic: bool = False


def deltas(checkpoint: Checkpoint, edits: Mapping[str, Edit], *, sample: int) -> list[Delta]:
    """The low-rank deltas among `edits`.

    Args:
        checkpoint: what the edits are made for.
        edits: by tensor; those that are no low-rank delta, or of a weight with NaN or infinities, are passed over.
        sample: elements of a tensor that are looked at, about; 2^20 take a twentieth of a second.
    """
    found = []
    for name, edit in edits.items():
        if isinstance(edit.operation, LowRankDelta):
            delta = _delta(checkpoint, name, edit.operation, sample)
            if math.isfinite(delta.size) and math.isfinite(delta.lost):
                found.append(delta)
    return found


def _delta(checkpoint: Checkpoint, name: str, operation: LowRankDelta, sample: int) -> Delta:
    left, right = operation.left.load(), operation.right.load()
    rank, seed = left.shape[1], operation.seed
    weight, left = _sampled(checkpoint.tensor(operation.input), left, sample)
    size = abs(operation.scale) * _norm(left, right) / max(float(weight.double().norm()), 1e-300)
    lost = realised(weight, left, right, operation.scale, seed=seed)
    return Delta(name, rank, size, lost, stochastic=seed is not None)


def _sampled(tensor: LazyTensor, left: torch.Tensor, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a weight and of its left factor: all of a small tensor, of a large one blocks from end to end."""
    import torch

    total = tensor.spec.rows
    rows = max(2, sample // BLOCKS // tensor.spec.shape[1])
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
    told = [one for one in found if one.lost > LOST and not one.stochastic]
    worst = max(told, key=lambda one: one.lost, default=None)
    if worst is None:
        return []
    note = (
        f"rounding takes more than {LOST:.0%} of the delta of {len(told)} of {len(found)} tensors, {worst.lost:.0%} of "
        f"{worst.name}: they are too small beside the weights; write the output in a wider dtype, or as an adapter"
    )
    return [note]


def reports(found: Sequence[Delta]) -> dict[str, FileRef]:
    """`deltas.json`: size and loss of every delta; empty without low-rank deltas."""
    if not found:
        return {}
    rows = {one.name: {"rank": one.rank, "size": rounded(one.size), "lost": rounded(one.lost)} for one in found}
    return {"deltas.json": FileRef(data=dump(rows))}


def rounded(number: float) -> float:
    """To three digits, which no machine computes differently."""
    return float(f"{number:.3g}")

"""What the masks amount to: computed tensor by tensor, counted, and dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.sparse_operations import Sparsity, pruned, scores
from regraft.plugins.prune.places import Matrix, Places


@dataclass(frozen=True)
class Figures:
    """Of one matrix.

    Args:
        zeros: entries that go.
        size: all entries.
        lost: the share of the squared scores (the mean over tasks) that goes with them.
        iou: by pair of tasks, what both masks prune over what either prunes.
    """

    zeros: int
    size: int
    lost: float
    iou: Mapping[str, float]


def figures(matrix: torch.Tensor, sparsity: Sparsity, norms: Mapping[str, torch.Tensor], mean: bool) -> Figures:
    """Figures of one matrix [outputs, inputs].

    Args:
        matrix: the weights.
        sparsity: how much goes.
        norms: by task; none for magnitude.
        mean: whether the mean of the norms gives one mask, not the intersection of each one's.
    """
    applied = applied_norms(norms, mean)
    gone = pruned(matrix, sparsity, applied)
    squares = sum((scores(matrix, norm).double().square() for norm in applied or (None,)), torch.zeros(()))
    total = float(squares.sum())
    masks = {task: sparsity.lowest(scores(matrix, norm)) for task, norm in norms.items()} if len(norms) > 1 else {}
    iou = {f"{one} {other}": intersection_over_union(masks[one], masks[other]) for one, other in combinations(masks, 2)}
    return Figures(int(gone.sum()), gone.numel(), float(squares[gone].sum()) / total if total else 0.0, iou)


def applied_norms(norms: Mapping[str, torch.Tensor], mean: bool) -> list[torch.Tensor]:
    """The norms that masks are made of: each task's, or their mean."""
    found = list(norms.values())
    return [torch.stack(found).double().mean(0).float()] if mean and len(found) > 1 else found


def intersection_over_union(one: torch.Tensor, other: torch.Tensor) -> float:
    """|A and B| / |A or B| of two masks; 1 where both are empty."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A mask [rows, ...] as bits, [rows, ceil(entries of a row / 8)] uint8: entry k is bit k % 8 of byte k // 8."""
    flat = mask.flatten(1)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).view(len(flat), -1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True)
class Masks:
    """Of the whole model.

    Args:
        figures: by the matrix's name.
        bits: by tensor, packed, if they were asked for.
    """

    figures: Mapping[str, Figures]
    bits: Mapping[str, torch.Tensor]


def count(
    checkpoint: Checkpoint,
    places: Places,
    norms: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    mean: bool,
    keep_bits: bool,
) -> Masks:
    """Figures of every matrix, one stored tensor in memory at a time; `norms` by task and tensor."""
    found: dict[str, Figures] = {}
    bits: dict[str, torch.Tensor] = {}
    for tensor, matrices in places.by_tensor().items():
        stored = checkpoint.load(tensor)
        own = {task: by_tensor[tensor] for task, by_tensor in norms.items()}
        for matrix in matrices:
            found[matrix.name] = figures(matrix.slot.read(stored), places.sparsity, own, mean)
        if keep_bits:
            bits[tensor] = packed(_mask(stored, matrices, places.sparsity, applied_norms(own, mean)))
    return Masks(found, bits)


def _mask(
    stored: torch.Tensor, matrices: Sequence[Matrix], sparsity: Sparsity, norms: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Which entries of a stored tensor go."""
    mask = torch.zeros_like(stored, dtype=torch.bool)
    for matrix in matrices:
        mask = matrix.slot.write(mask, pruned(matrix.slot.read(stored), sparsity, norms))
    return mask

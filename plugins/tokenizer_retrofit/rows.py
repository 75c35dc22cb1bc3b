"""Rows of the embeddings and the head for a new vocabulary: sums of old rows, and rows that are brought along.

The mean of the pieces is fast vocabulary transfer (Gee et al., arXiv 2402.09977): it is not rescaled, since with tied
embeddings a longer row is a larger logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.core.operations import Operation
from regraft.core.row_map import row_map
from regraft.core.tensors import LazyTensor, MemoryTensor
from regraft.plugins.tokenizer_retrofit.vocabulary import Origin

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Rows:
    """How the rows of one table are made, one entry for each row of the new one.

    Args:
        parts: rows of the old table, or, from its length on, rows of `brought`; none gives a row of zeros.
        weights: of the parts; None for means.
        brought: [n, ...] fp32.
    """

    parts: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]] | None = None
    brought: torch.Tensor | None = None

    def operation(self, name: str) -> Operation:
        """The map of the table `name`."""
        brought: LazyTensor | None = None if self.brought is None else MemoryTensor("brought", self.brought)
        return row_map(name, self.parts, self.weights, brought)

    def values(self, table: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        """[n, ...] fp32: some rows of the new table, from the old one."""
        import torch

        rows = table.float() if self.brought is None else torch.cat([table.float(), self.brought.float()])
        made = []
        for index in indices:
            parts = torch.tensor(self.parts[index], dtype=torch.int64)
            share = torch.full((len(parts),), 1 / max(1, len(parts)))
            if self.weights is not None:
                share = torch.tensor(self.weights[index])
            made.append((rows[parts] * share.view(-1, *[1] * (rows.dim() - 1))).sum(0))
        return torch.stack(made) if made else rows[:0]


def subtoken_means(table: torch.Tensor, origins: Sequence[Origin]) -> Rows:
    """Kept rows as they are; new ones as the mean of the rows that spell them, or, unspelled, of all old rows."""
    mean = len(table)
    parts = [[origin.kept] if origin.kept is not None else [*origin.parts] or [mean] for origin in origins]
    unspelled = any(origin.kept is None and not origin.parts for origin in origins)
    return Rows(parts, None, table.float().mean(0, keepdim=True) if unspelled else None)

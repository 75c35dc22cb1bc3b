"""Rows of the embeddings and the head for a new vocabulary: sums of old rows, and rows that are brought along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.core.errors import TransformationError
from regraft.core.operations import Operation
from regraft.core.row_map import row_map
from regraft.core.tensors import LazyTensor, MemoryTensor
from regraft.plugins.tokenizer_retrofit.focus import Mixture
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

    def check_copies(self, name: str, origins: Sequence[Origin]) -> None:
        """Whether the row of each kept token is one old row, its own, so that its bits stay.

        Raises:
            TransformationError: it is not.
        """
        for index, (origin, parts) in enumerate(zip(origins, self.parts, strict=True)):
            weights = [1.0] if self.weights is None else list(self.weights[index])
            if origin.kept is not None and (list(parts) != [origin.kept] or weights != [1.0]):
                raise TransformationError("the row of a kept token is no copy", where=f"{name}: row {index}",
                                          expected=f"old row {origin.kept}", found=f"rows {list(parts)}")  # fmt: skip

    def operation(self, name: str, padding: int) -> Operation:
        """The map of the table `name`, with so many rows of zeros behind it."""
        brought: LazyTensor | None = None if self.brought is None else MemoryTensor("brought", self.brought)
        weights = None if self.weights is None else [*self.weights, *[()] * padding]
        return row_map(name, [*self.parts, *[()] * padding], weights, brought)


def subtoken_means(table: LazyTensor, origins: Sequence[Origin]) -> Rows:
    """Kept rows as they are; new ones as the mean of the rows that spell them, or, unspelled, of all old rows.

    Gee et al., Fast Vocabulary Transfer (arXiv 2402.09977). Not rescaled: with tied embeddings a longer row is a larger
    logit, and the part that all rows share is most of their length.
    """
    mean = table.spec.rows
    parts = [[origin.kept] if origin.kept is not None else [*origin.parts] or [mean] for origin in origins]
    unspelled = any(origin.kept is None and not origin.parts for origin in origins)
    return Rows(parts, None, table.load().float().mean(0, keepdim=True) if unspelled else None)


def mixed(table: LazyTensor, origins: Sequence[Origin], mixture: Mixture, share: float = 1.0) -> Rows:
    """New rows as mixtures of old ones, by `share`, and for the rest as means of their pieces.

    Args:
        table: [rows, ...] the old one; read only where a token cannot be spelled.
        origins: of the new rows.
        mixture: by new row; a row without one is the mean alone.
        share: of the mixture.
    """
    means = subtoken_means(table, origins)
    parts: list[list[int]] = []
    weights: list[list[float]] = []
    for index, pieces in enumerate(means.parts):
        own, weight = mixture.get(index, ([], []))
        rest = 1 - share if own else 1.0
        kept = [*pieces] if rest else []
        parts.append([*own, *kept])
        weights.append([*(share * one for one in weight), *[rest / len(pieces)] * len(kept)])
    return Rows(parts, weights, means.brought)


def drawn(table: LazyTensor, origins: Sequence[Origin], *, deviation: float, seed: int) -> Rows:
    """New rows drawn around the mean of the old: N(mean, (deviation · std)²) for each entry; `mean` draws none.

    Args:
        table: [rows, ...].
        origins: of the new rows.
        deviation: 0 for the mean itself.
        seed: of the draw.
    """
    import torch

    wide = table.load().float()
    new = [index for index, origin in enumerate(origins) if origin.kept is None]
    place: Mapping[int, int] = {index: table.spec.rows + number for number, index in enumerate(new)}
    noise = torch.randn(len(new), *table.spec.shape[1:], generator=torch.Generator().manual_seed(seed))
    brought = wide.mean(0) + deviation * wide.std(0) * noise
    parts = [[origin.kept] if origin.kept is not None else [place[index]] for index, origin in enumerate(origins)]
    return Rows(parts, None, brought)


def predicted(table: LazyTensor, origins: Sequence[Origin], rows: Mapping[int, int], values: torch.Tensor) -> Rows:
    """New rows from elsewhere, and means of pieces where there is none.

    Args:
        table: [rows, ...] the old one.
        origins: of the new rows.
        rows: the row of `values` for each new one that has one.
        values: [n, ...].
    """
    import torch

    means = subtoken_means(table, origins)
    brought = values.float() if means.brought is None else torch.cat([means.brought, values.float()])
    first = table.spec.rows + len(brought) - len(values)
    parts = [[first + rows[index]] if index in rows else one for index, one in enumerate(means.parts)]
    return Rows(parts, None, brought)

"""Tensors that are computed from a weight piece by piece: what all parts of quantised weights share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from regraft.core.derived import open_rows
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor

if TYPE_CHECKING:
    import torch

PIECE_ELEMENTS = 1 << 17
"""Quantised at a time: fp32 copies and masks of a piece stay in the second-level cache."""

Pieces = Callable[[int, int], Iterator["tuple[int, int, torch.Tensor]"]]
"""Called with (begin, end), gives (begin, end, values) piece after piece."""


class Part(LazyTensor):
    """A tensor that is computed from a weight piece by piece."""

    def __init__(self, spec: TensorSpec, weight: LazyTensor) -> None:
        self.spec = spec
        self.sources = (weight,)

    @property
    def row_local(self) -> bool:
        """Whether the weight can be read piece by piece."""
        return self.sources[0].row_local

    @property
    def held_bytes(self) -> int:
        """Copies of a piece, and the whole weight where it can only be had whole."""
        (weight,) = self.sources
        whole = 0 if weight.row_local else 2 * weight.spec.nbytes
        return weight.held_bytes + whole + 16 * PIECE_ELEMENTS


def flat_pieces(weight: LazyTensor, block_size: int, device: str) -> Pieces:
    """Pieces of the flattened weight that end where a row and a block end, so that no row is read twice, unless that
    would make them too large.
    """
    read, row = open_rows(weight, device), weight.spec.shape[1]
    unit = math.lcm(row, block_size)
    step = PIECE_ELEMENTS // unit * unit or PIECE_ELEMENTS

    def pieces(begin: int, end: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        while begin < end:
            stop = min((begin // step + 1) * step, end)
            first = begin // row
            values = read(first, -(-stop // row)).reshape(-1)[begin - first * row : stop - first * row]
            yield begin, stop, values
            begin = stop

    return pieces


def row_pieces(weight: LazyTensor, device: str) -> Pieces:
    """Rows `start` to `stop`, some at a time."""
    read, step = open_rows(weight, device), max(1, PIECE_ELEMENTS // weight.spec.shape[1])

    def pieces(start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield first, last, read(first, last)

    return pieces

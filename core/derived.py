"""Lazy tensors made of others, or of constants, without being the operation of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from regraft.core.specs import TensorSpec, torch_dtype
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch


class ConstantTensor(LazyTensor):
    """A small tensor whose bytes are known at plan time, without torch."""

    def __init__(self, spec: TensorSpec, data: bytes) -> None:
        assert len(data) == spec.nbytes
        self.spec = spec
        self.data = data

    @property
    def held_bytes(self) -> int:
        """The bytes."""
        return len(self.data)

    def open(self, device: str = "cpu") -> RowReader:
        """Slices of the tensor."""
        import torch

        values = torch.frombuffer(bytearray(self.data), dtype=torch.uint8).view(torch_dtype(self.spec.dtype)).to(device)
        rows = values.view(self.spec.rows, *self.spec.shape[1:])
        return lambda start, stop: rows[start:stop]


class TransposedTensor(LazyTensor):
    """A matrix with its rows and columns exchanged."""

    def __init__(self, source: LazyTensor) -> None:
        rows, columns = source.spec.shape
        self.spec = replace(source.spec, shape=(columns, rows))
        self.sources = (source,)

    @property
    def row_local(self) -> bool:
        """Never: a row takes something of every row of the source."""
        return False

    @property
    def held_bytes(self) -> int:
        """The source and the result."""
        return self.sources[0].held_bytes + 2 * self.spec.nbytes

    def open(self, device: str = "cpu") -> RowReader:
        """Reads the whole source, once."""
        (source,) = self.sources
        read = source.open(device)
        return held(lambda: read(0, source.spec.rows).t().contiguous())


def open_rows(tensor: LazyTensor, device: str) -> RowReader:
    """A reader to be asked piece by piece: what is not row-local is computed whole at the first piece."""
    read = tensor.open(device)
    return read if tensor.row_local else held(lambda: read(0, tensor.spec.rows))


def held(compute: Callable[[], torch.Tensor]) -> RowReader:
    """A reader of a tensor that is computed when its first rows are asked for, and kept until the reader is dropped."""
    kept: list[torch.Tensor] = []

    def read(start: int, stop: int) -> torch.Tensor:
        if not kept:
            kept.append(compute())
        return kept[0][start:stop]

    return read

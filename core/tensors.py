"""Tensors that are read, row by row, when somebody asks: from a file, from memory, or as the result of an operation."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.buffers import CHUNK_BYTES, open_input, phased_empty, read_into
from regraft.core.errors import InputError, PluginError
from regraft.core.header import Entry, Header, read_header
from regraft.core.specs import TensorSpec, spec_of, torch_dtype

if TYPE_CHECKING:
    import torch

RowReader = Callable[[int, int], "torch.Tensor"]
"""Called with (start, stop), gives rows start..stop of a tensor, [stop - start, ...], in the tensor's own dtype."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes that exist on disk as they are: copied by the kernel, never decoded."""

    path: Path
    offset: int
    nbytes: int


class LazyTensor(ABC):
    """A tensor known by its spec, whose values are computed or read only on request."""

    spec: TensorSpec
    sources: tuple[LazyTensor, ...] = ()
    """The tensors that its values come from; none for one that is stored, or made of nothing."""

    @property
    def row_local(self) -> bool:
        """Whether rows can be had without computing the whole tensor."""
        return True

    @property
    def raw(self) -> ByteRange | None:
        """Where the bytes stand on disk, if they stand there unchanged."""
        return None

    @property
    def held_bytes(self) -> int:
        """Bytes that an open reader holds beside the rows it returns: operands, packed inputs."""
        return 0

    @abstractmethod
    def open(self, device: str = "cpu") -> RowReader:
        """A reader of rows on `device`. It may hold operands until it is dropped; one thread at a time uses it."""

    def load(self, device: str = "cpu") -> torch.Tensor:
        """The whole tensor, in the shape and dtype of its spec."""
        return self.open(device)(0, self.spec.rows).reshape(self.spec.shape)


def row_chunks(spec: TensorSpec, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `chunk_bytes` that cover `spec`. They depend on the spec alone, hence so do the bytes
    computed from them, whatever the number of threads.
    """
    step = max(1, chunk_bytes // max(1, spec.row_bytes))
    for start in range(0, spec.rows, step):
        yield start, min(start + step, spec.rows)


def check_rows(spec: TensorSpec, rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` if they are `count` rows of `spec`; a scalar counts as one row.

    Raises:
        PluginError: they are not what the spec promised; writing them would damage the tensors beside it.
    """
    expected = (count, *spec.shape[1:])
    if rows.dim() == 0 and not spec.shape:
        rows = rows.reshape(1)
    if tuple(rows.shape) != expected:
        raise PluginError(
            "an operation computes another shape than its edit says",
            where=spec.name,
            expected=list(expected),
            found=list(rows.shape),
            remedy="report it to the author of the step's plugin",
        )
    return rows


class WeightFile:
    """One open safetensors file with a validated header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header = read_header(path)
        self.descriptor = open_input(path)
        weakref.finalize(self, os.close, self.descriptor)

    def tensors(self) -> dict[str, FileTensor]:
        """Every tensor of the file by name, in the order of its bytes."""
        return {name: FileTensor(self, entry) for name, entry in self.header.entries.items()}


class FileTensor(LazyTensor):
    """A tensor stored in a safetensors file."""

    def __init__(self, file: WeightFile, entry: Entry) -> None:
        self.file = file
        self.entry = entry
        self.spec = entry.spec

    @property
    def raw(self) -> ByteRange:
        """Its bytes in the file."""
        return ByteRange(self.file.path, self.entry.offset, self.spec.nbytes)

    def open(self, device: str = "cpu") -> RowReader:
        """Reads rows into a fresh buffer; with CUDA a pinned one that is copied asynchronously.

        Raises:
            InputError: from the reader; the file ends early or cannot be read.
            PluginError: from the reader; rows are asked for that the tensor does not have.
        """
        dtype, row_bytes = torch_dtype(self.spec.dtype), self.spec.row_bytes
        shape, pinned = self.spec.shape[1:], device.startswith("cuda")
        where = f"{self.file.path}: {self.spec.name}"

        def read(start: int, stop: int) -> torch.Tensor:
            if not 0 <= start <= stop <= self.spec.rows:
                raise PluginError("rows are read that a tensor does not have", where=where, found=f"{start} to {stop}")
            offset = self.entry.offset + start * row_bytes
            buffer = phased_empty((stop - start) * row_bytes, offset, pinned=pinned)
            read_into(self.file.descriptor, buffer, offset, where=where)
            rows = buffer.view(dtype).view(stop - start, *shape)
            return rows.to(device, non_blocking=True) if pinned else rows

        return read


class MemoryTensor(LazyTensor):
    """A tensor that is already in memory."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.spec = spec_of(name, tensor)
        self._tensor = tensor.detach()

    @property
    def held_bytes(self) -> int:
        """The tensor itself."""
        return self.spec.nbytes

    def open(self, device: str = "cpu") -> RowReader:
        """Slices of the tensor."""
        tensor = self._tensor.to(device).reshape(self.spec.rows, *self.spec.shape[1:])
        return lambda start, stop: tensor[start:stop]


class PromisedTensor(LazyTensor):
    """A tensor of which a plan knows the spec, while the values come only with the run."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec

    def open(self, device: str = "cpu") -> RowReader:
        """Always raises: a plan has no values.

        Raises:
            InputError: always.
        """
        raise InputError("its values are known only after the step that makes them has run", where=self.spec.name)

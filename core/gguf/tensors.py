"""Tensors of a GGUF file as lazy tensors: dequantised on read, a few rows at a time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.buffers import phased_empty, read_into
from regraft.core.errors import InputError
from regraft.core.gguf.reader import GgufHeader, Stored, read_header
from regraft.core.specs import TensorSpec, torch_dtype
from regraft.core.tensors import ByteRange, LazyTensor, RowReader

if TYPE_CHECKING:
    import torch

PLAIN = frozenset({"F32", "F16", "BF16"})
"""Encodings that are safetensors dtypes as they stand."""

_GROUP_ELEMENTS = 1 << 15
"""Elements dequantised at a time: what fits the caches. A 512 x 4096 matrix at once takes up to 10 times as long."""


class GgufFile:
    """One open GGUF file with a validated header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: GgufHeader = read_header(path)
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the stored tensor differs from the one that transformers expects.

    Args:
        rotary_head_dim: the rows of each head are interleaved (one of its first half, one of its second, and so on) for
            llama.cpp's kind of rotary embedding; this is the head's size, 0 if the rows stand in order.
        shift: what the converter added to every value.
    """

    rotary_head_dim: int = 0
    shift: float = 0.0


AS_IT_IS = Layout()


class GgufTensor(LazyTensor):
    """A tensor stored in a GGUF file, in the name, shape, order and dtype that transformers expects.

    F16 and BF16 stay what they are unless they are shifted; everything else becomes F32.

    Args:
        file: where it stands.
        stored: how it stands there.
        name: its name in transformers.
        layout: what the converter did to it.

    Raises:
        InputError: nothing here dequantises its encoding.
    """

    def __init__(self, file: GgufFile, stored: Stored, name: str, layout: Layout = AS_IT_IS) -> None:
        self.file = file
        self.stored = stored
        self.layout = layout
        keeps = stored.type_name in PLAIN and not layout.shift
        self.spec = TensorSpec(name, stored.type_name if keeps else "F32", stored.shape)
        if stored.type_name not in PLAIN:
            _dequantiser(file.path, stored)

    @property
    def raw(self) -> ByteRange | None:
        """Its bytes in the file, if they need no change."""
        if self.spec.dtype != self.stored.type_name or self.layout != AS_IT_IS:
            return None
        return ByteRange(self.file.path, self.stored.offset, self.spec.nbytes)

    def open(self, device: str = "cpu") -> RowReader:
        """Reads packed rows, undoes the interleaving while they are small, and dequantises what was asked for."""
        decode = self._decoder()
        pinned = device.startswith("cuda")

        def read(start: int, stop: int) -> torch.Tensor:
            rows = decode(self._packed(start, stop, pinned)).view(stop - start, *self.spec.shape[1:])
            rows = rows - self.layout.shift if self.layout.shift else rows
            return rows if device == "cpu" else rows.to(device, non_blocking=pinned)

        return read

    def _packed(self, start: int, stop: int, pinned: bool) -> torch.Tensor:
        """Rows start..stop of the result as stored bytes, uint8 [stop - start, row_bytes]."""
        head_dim = self.layout.rotary_head_dim
        first = start // head_dim * head_dim if head_dim else start
        last = min(-(-stop // head_dim) * head_dim, self.spec.rows) if head_dim else stop
        row_bytes, offset = self.stored.row_bytes, self.stored.offset + first * self.stored.row_bytes
        buffer = phased_empty((last - first) * row_bytes, offset, pinned=pinned)
        read_into(self.file.descriptor, buffer, offset, where=f"{self.file.path}: {self.stored.name}")
        rows = buffer.view(last - first, row_bytes)
        return rows[_interleaved(start, stop, head_dim) - first] if head_dim else rows

    def _decoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.stored.type_name in PLAIN:
            dtype, result = torch_dtype(self.stored.type_name), torch_dtype(self.spec.dtype)
            return lambda packed: packed.view(-1).view(dtype).to(result)
        return self._dequantise

    def _dequantise(self, packed: torch.Tensor) -> torch.Tensor:
        import numpy as np
        import torch

        dequantiser = _dequantiser(self.file.path, self.stored)
        blocks = packed.numpy().reshape(-1, self.stored.block_bytes)
        result = np.empty((len(blocks), self.stored.block), dtype=np.float32)
        group = max(1, _GROUP_ELEMENTS // self.stored.block)
        with np.errstate(all="ignore"):  # infinite scales are the file's, and NaN is counted where tensors are computed
            for start in range(0, len(blocks), group):
                result[start : start + group] = dequantiser(blocks[start : start + group])
        return torch.from_numpy(result)


def _interleaved(start: int, stop: int, head_dim: int) -> torch.Tensor:
    """Where rows start..stop of transformers' order stand in llama.cpp's.

    Row (head, half, i) of transformers, with half 0 or 1 and i < head_dim / 2, is row (head, i, half) of llama.cpp.
    """
    import torch

    rows = torch.arange(start, stop)
    within = rows % head_dim
    half, index = within // (head_dim // 2), within % (head_dim // 2)
    return rows - within + 2 * index + half


def _dequantiser(path: Path, stored: Stored) -> Callable[[Any], Any]:
    """Gives float32 [n, block] for uint8 [n, block_bytes]."""
    from gguf import quants

    kind = getattr(quants, stored.type_name, None)
    if kind is None or not hasattr(kind, "dequantize_blocks"):
        raise InputError(
            "has an encoding that nothing here dequantises",
            where=f"{path}: {stored.name}",
            expected="F32, F16, BF16 or a quantised type of the gguf library",
            found=stored.type_name,
            remedy="install a newer gguf, or requantise the model to a common type",
        )
    kind.init_grid()
    return kind.dequantize_blocks  # type: ignore[no-any-return]

"""The tensors that store one quantised weight, computed from it piece by piece when they are written.

A weight is quantised once; its scales, which stand elsewhere in the output, are found by reading it a second time. That
costs 1 ns an element where quantising to NF4 costs 11, and holding the scales until they are written would take an
eighth of the output's size in memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from regraft.core.dequantised import EightBitTensor, FourBitTensor
from regraft.core.derived import ConstantTensor, open_rows
from regraft.core.fourbit import NF4, OUTPUT_BLOCK_SIZE, STATE_MARK, State, block_scales, encode_nf4
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch

_PIECE_ELEMENTS = 1 << 17
"""Quantised at a time: fp32 copies and masks of a piece stay in the second-level cache."""


def nf4_parts(weight: LazyTensor) -> list[LazyTensor]:
    """The tensors that store `weight` [rows, columns] in NF4.

    A weight that came out of exactly this form gives the stored tensors themselves, which are then copied.
    """
    name, state = weight.spec.name, State("nf4", OUTPUT_BLOCK_SIZE, weight.spec.dtype, weight.spec.shape)
    data = state.dump()
    table = ConstantTensor(TensorSpec(f"{name}.quant_map", "F32", (len(NF4),)), struct.pack("<16f", *NF4))
    text = ConstantTensor(TensorSpec(f"{name}{STATE_MARK}nf4", "U8", (len(data),)), data)
    if isinstance(weight, FourBitTensor) and weight.state == state and weight.codes.spec.dtype == "U8":
        return [weight.codes, weight.scales, table, text]
    return [Nf4Codes(weight), Nf4Scales(weight), table, text]


def int8_parts(weight: LazyTensor) -> list[LazyTensor]:
    """The tensors that store `weight` [rows, columns] in 8 bits, one scale a row; stored ones are given as they are."""
    module = weight.spec.name.removesuffix("weight")
    form = ConstantTensor(TensorSpec(f"{module}weight_format", "U8", ()), b"\0")
    if isinstance(weight, EightBitTensor):
        return [*weight.sources, form]
    return [Int8Codes(weight), Int8Scales(weight, f"{module}SCB"), form]


class _Part(LazyTensor):
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
        return weight.held_bytes + whole + 16 * _PIECE_ELEMENTS

    def _pieces(self, device: str) -> Callable[[int, int], Iterator[torch.Tensor]]:
        """A function that gives elements `begin` to `end` of the flattened weight, piece by piece.

        Pieces end where a row and a block end, so that no row is read twice, unless that would make them too large.
        """
        spec = self.sources[0].spec
        read, row = open_rows(self.sources[0], device), spec.shape[1]
        unit = math.lcm(row, OUTPUT_BLOCK_SIZE)
        step = _PIECE_ELEMENTS // unit * unit or _PIECE_ELEMENTS

        def pieces(begin: int, end: int) -> Iterator[torch.Tensor]:
            while begin < end:
                stop = min((begin // step + 1) * step, end)
                first = begin // row
                yield read(first, -(-stop // row)).reshape(-1)[begin - first * row : stop - first * row]
                begin = stop

        return pieces


class Nf4Codes(_Part):
    """Packed NF4 codes, uint8 [ceil(elements / 2), 1]."""

    def __init__(self, weight: LazyTensor) -> None:
        super().__init__(TensorSpec(weight.spec.name, "U8", (-(-weight.spec.numel // 2), 1)), weight)

    def open(self, device: str = "cpu") -> RowReader:
        """Quantises the blocks that the bytes belong to."""
        import torch

        pieces, block, numel = self._pieces(device), OUTPUT_BLOCK_SIZE, self.sources[0].spec.numel

        def read(start: int, stop: int) -> torch.Tensor:
            begin = 2 * start // block * block
            end = min(-(-2 * stop // block) * block, numel)
            codes = [encode_nf4(piece, block_scales(piece, block), block) for piece in pieces(begin, end)]
            return torch.cat(codes)[start - begin // 2 : stop - begin // 2, None]

        return read


class Nf4Scales(_Part):
    """The scale of each block, fp32 [ceil(elements / 64)]."""

    def __init__(self, weight: LazyTensor) -> None:
        blocks = -(-weight.spec.numel // OUTPUT_BLOCK_SIZE)
        super().__init__(TensorSpec(f"{weight.spec.name}.absmax", "F32", (blocks,)), weight)

    def open(self, device: str = "cpu") -> RowReader:
        """The largest magnitudes of the blocks."""
        import torch

        pieces, block, numel = self._pieces(device), OUTPUT_BLOCK_SIZE, self.sources[0].spec.numel
        return lambda start, stop: torch.cat(
            [block_scales(piece, block) for piece in pieces(start * block, min(stop * block, numel))]
        )


class Int8Codes(_Part):
    """Codes of an 8-bit weight, int8 [rows, columns]."""

    def __init__(self, weight: LazyTensor) -> None:
        super().__init__(replace(weight.spec, dtype="I8"), weight)

    def open(self, device: str = "cpu") -> RowReader:
        """Rounds `127 · value / scale`."""
        import torch

        rows = _half_rows(self.sources[0], device)

        def codes(values: torch.Tensor) -> torch.Tensor:
            scales = values.abs().amax(dim=1).float()
            factors = torch.where(scales > 0, 127.0 / scales, 0.0)
            return values.float().mul_(factors[:, None]).round_().to(torch.int8)

        return lambda start, stop: torch.cat([codes(values) for values in rows(start, stop)])


class Int8Scales(_Part):
    """The largest magnitude of each row, fp32 [rows]."""

    def __init__(self, weight: LazyTensor, name: str) -> None:
        super().__init__(TensorSpec(name, "F32", weight.spec.shape[:1]), weight)

    def open(self, device: str = "cpu") -> RowReader:
        """Of the values in float16, as the codes are."""
        import torch

        rows = _half_rows(self.sources[0], device)
        return lambda start, stop: torch.cat([values.abs().amax(dim=1).float() for values in rows(start, stop)])


def _half_rows(weight: LazyTensor, device: str) -> Callable[[int, int], Iterator[torch.Tensor]]:
    """A function that gives rows `start` to `stop` in float16, some at a time: bitsandbytes casts before all else."""
    read, step = open_rows(weight, device), max(1, _PIECE_ELEMENTS // weight.spec.shape[1])
    return lambda start, stop: (read(row, min(row + step, stop)).half() for row in range(start, stop, step))

"""Quantised weights seen as float tensors, dequantised row by row when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.core.derived import open_rows
from regraft.core.fourbit import TABLES, State
from regraft.core.specs import ITEM_BYTES, TensorSpec, torch_dtype
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch

INT8_STEP = 7.874015718698502e-3
"""1/127 as bitsandbytes writes it down."""


class FourBitTensor(LazyTensor):
    """A 4-bit weight, dequantised block by block: rows need only the bytes of the blocks they touch.

    Args:
        spec: the weight as it is shown.
        state: how to read it.
        codes: packed codes, of any dtype (`bnb_4bit_quant_storage`).
        scales: fp32 scales, or uint8 codes of them.
        nested_scales, nested_map: fp32; present where the scales are quantised too.
    """

    def __init__(
        self,
        spec: TensorSpec,
        state: State,
        codes: LazyTensor,
        scales: LazyTensor,
        nested_scales: LazyTensor | None = None,
        nested_map: LazyTensor | None = None,
    ) -> None:
        self.spec = spec
        self.state = state
        self.codes = codes
        self.scales = scales
        self.nested_scales = nested_scales
        self.nested_map = nested_map
        self.sources = tuple(part for part in (codes, scales, nested_scales, nested_map) if part)

    @property
    def held_bytes(self) -> int:
        """The tables, and what the stored tensors hold."""
        tables = [part.spec.nbytes for part in (self.nested_scales, self.nested_map) if part]
        return 2048 + sum(tables) + sum(part.held_bytes for part in self.sources)

    def open(self, device: str = "cpu") -> RowReader:
        """Reads codes and scales of the blocks that the rows touch."""
        from regraft.kernels.four_bit import decode, pair_table

        read_codes, read_scales = self.open_codes(device), self.open_scales(device)
        pairs, dtype = pair_table(TABLES[self.state.quant_type], device), torch_dtype(self.spec.dtype)
        block, row = self.state.block_size, self.spec.numel // self.spec.rows

        def read(start: int, stop: int) -> torch.Tensor:
            first, last = start * row // block, -(-stop * row // block)
            begin, count = first * block, min(last * block, self.spec.numel) - first * block
            codes = read_codes(begin // 2, (begin + count + 1) // 2)
            values = decode(codes, read_scales(first, last), pairs, block, count)
            return values[start * row - begin : stop * row - begin].to(dtype).view(stop - start, *self.spec.shape[1:])

        return read

    def open_codes(self, device: str) -> RowReader:
        """Reads bytes `start` to `stop`, whatever the dtype that they are stored as."""
        import torch

        item = ITEM_BYTES[self.codes.spec.dtype]
        read_items = open_rows(self.codes, device)

        def read(start: int, stop: int) -> torch.Tensor:
            first = start // item
            data = read_items(first, -(-stop // item)).contiguous().view(torch.uint8).view(-1)
            return data[start - first * item : stop - first * item]

        return read

    def open_scales(self, device: str) -> RowReader:
        """Reads fp32 scales of blocks `start` to `stop`."""
        import torch

        from regraft.kernels.four_bit import decode_scales

        nested, read_codes = self.state.nested, open_rows(self.scales, device)
        if nested is None or self.nested_scales is None or self.nested_map is None:
            return read_codes
        scales, table = self.nested_scales.load(device), self.nested_map.load(device)
        offset = torch.tensor(nested.offset, dtype=torch.float32, device=device)

        return lambda start, stop: decode_scales(
            read_codes(start, stop), scales, table, nested.block_size, offset, start
        )


class EightBitTensor(LazyTensor):
    """An 8-bit weight: `code · scale / 127`, one scale a row."""

    def __init__(self, spec: TensorSpec, codes: LazyTensor, scales: LazyTensor) -> None:
        self.spec = spec
        self.sources = (codes, scales)

    @property
    def held_bytes(self) -> int:
        """What the stored tensors hold."""
        return sum(part.held_bytes for part in self.sources)

    def open(self, device: str = "cpu") -> RowReader:
        """Reads the rows and their scales."""
        read_codes, read_scales = (open_rows(part, device) for part in self.sources)
        dtype = torch_dtype(self.spec.dtype)
        return lambda start, stop: (
            read_codes(start, stop).float().mul_(read_scales(start, stop).view(-1, 1)).mul_(INT8_STEP).to(dtype)
        )

"""The tensors that store one weight in 4 bits, computed from it piece by piece when they are written.

A weight is quantised once; its scales, which stand elsewhere in the output, are found by reading it a second time. That
costs 1 ns an element where quantising to NF4 costs 11, and holding the scales until they are written would take an
eighth of the output's size in memory. Scales that are quantised in their turn need all scales of the weight, for their
mean; each of the three tensors that depend on it finds them anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from regraft.core.dequantised import FourBitTensor
from regraft.core.derived import held
from regraft.core.fourbit import STATE_MARK, TABLES, Nested, State
from regraft.core.low_rank import LowRankDelta
from regraft.core.operations import ComputedTensor
from regraft.core.quantised_parts import PIECE_ELEMENTS, Part, flat_pieces
from regraft.core.realised import Gauge
from regraft.core.specs import ITEM_BYTES, TensorSpec, torch_dtype
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch

Coded = Callable[[int, int], Iterator["tuple[int, int, torch.Tensor | None, torch.Tensor]"]]
"""Called with (begin, end), gives (begin, end, codes, scales) piece after piece of a flattened weight."""


def num_blocks(state: State) -> int:
    """Scales of a weight."""
    return -(-math.prod(state.shape) // state.block_size)


class _FourBitPart(Part):
    """A part of a 4-bit weight."""

    def __init__(self, spec: TensorSpec, weight: LazyTensor, state: State) -> None:
        super().__init__(spec, weight)
        self.state = state

    @property
    def merge(self) -> tuple[FourBitTensor, LowRankDelta] | None:
        """The stored weight and the delta, where the weight is a stored one of this form plus a low-rank delta, and its
        rows are whole blocks: then both are merged in 4 bits, see `regraft.kernels.nf4_merge`.
        """
        weight, block = self.sources[0], self.state.block_size
        if not isinstance(weight, ComputedTensor) or type(weight.operation) is not LowRankDelta:
            return None
        below = weight.sources[0]
        if not isinstance(below, FourBitTensor) or weight.spec.dtype != "F32" or weight.spec.shape[1] % block:
            return None
        same = (below.state.quant_type, below.state.block_size) == (self.state.quant_type, block)
        return (below, weight.operation) if same else None

    def _coder(self, device: str, *, only_scales: bool = False) -> Coded:
        """Codes and scales, piece by piece; no codes with `only_scales`, which costs a third."""
        from regraft.kernels.four_bit import block_scales, encode

        if (merge := self.merge) is not None:
            return _merging(*merge, device, only_scales=only_scales)
        block, table = self.state.block_size, TABLES[self.state.quant_type]
        pieces = flat_pieces(self.sources[0], block, device)

        def coded(begin: int, end: int) -> Iterator[tuple[int, int, torch.Tensor | None, torch.Tensor]]:
            for first, last, values in pieces(begin, end):
                scales = block_scales(values, block)
                yield first, last, None if only_scales else encode(values, scales, block, table), scales

        return coded

    def _scales(self, device: str) -> RowReader:
        """Reads fp32 scales of blocks `start` to `stop`."""
        import torch

        coded, block, numel = self._coder(device, only_scales=True), self.state.block_size, self.sources[0].spec.numel
        return lambda start, stop: torch.cat([piece[3] for piece in coded(start * block, min(stop * block, numel))])


def _merging(below: FourBitTensor, delta: LowRankDelta, device: str, *, only_scales: bool) -> Coded:
    """Codes and scales of a stored weight plus a low-rank delta, in pieces of whole rows."""
    from regraft.kernels.nf4_merge import nf4_merge, nf4_merge_scales

    block, table, row = below.state.block_size, TABLES[below.state.quant_type], below.spec.shape[1]
    read_codes, read_scales = below.open_codes(device), below.open_scales(device)
    left, right = delta.left.load(device).float(), delta.right.load(device).float()
    step = max(1, PIECE_ELEMENTS // row) * row
    nothing = not (left.any() and right.any())  # then FP4's second code for zero stays too

    def coded(begin: int, end: int) -> Iterator[tuple[int, int, torch.Tensor | None, torch.Tensor]]:
        while begin < end:
            stop = min((begin // step + 1) * step, end)
            first, last = begin // row, -(-stop // row)
            codes = read_codes(first * row // 2, last * row // 2)
            scales = read_scales(first * row // block, last * row // block)
            new: torch.Tensor | None = codes
            if nothing:
                pass
            elif only_scales:
                scales = nf4_merge_scales(
                    codes, scales, left[first:last], right, delta.scale, table=table, block_size=block
                )
            else:
                new, scales = nf4_merge(
                    codes, scales, left[first:last], right, delta.scale, table=table, block_size=block
                )
            if new is not None:
                new = new[(begin - first * row) // 2 : (stop - first * row) // 2]
            yield begin, stop, new, scales[(begin - first * row) // block : (stop - first * row) // block]
            begin = stop

    return coded


class FourBitCodes(_FourBitPart):
    """Packed codes, [ceil(elements / 2), 1] bytes, in items of any dtype.

    Args:
        weight: float values [rows, columns].
        state: the form.
        storage: safetensors code of the dtype that the bytes are stored as.
        gauge: told what the codes keep.
        stored: a weight with doubly quantised scales, in whose form this one's are; the gauge takes account of that.
    """

    def __init__(
        self,
        weight: LazyTensor,
        state: State,
        storage: str = "U8",
        *,
        gauge: Gauge | None = None,
        stored: FourBitTensor | None = None,
    ) -> None:
        items = -(-weight.spec.numel // 2) // ITEM_BYTES[storage]
        super().__init__(TensorSpec(weight.spec.name, storage, (items, 1)), weight, state)
        self.gauge = gauge
        self.stored = stored

    @property
    def held_bytes(self) -> int:
        """Also the base that the gauge compares with, and the scales of the whole weight if they are quantised."""
        scales = 12 * num_blocks(self.state) if self.stored is not None else 0
        return super().held_bytes + scales + (self.gauge.base.held_bytes if self.gauge else 0)

    def open(self, device: str = "cpu") -> RowReader:
        """Quantises the blocks that the bytes belong to."""
        import torch

        coded, block, numel = self._coder(device), self.state.block_size, self.sources[0].spec.numel
        item, dtype, measure = ITEM_BYTES[self.spec.dtype], torch_dtype(self.spec.dtype), self._measure(device)

        def read(start: int, stop: int) -> torch.Tensor:
            begin = 2 * start * item // block * block
            end = min(-(-2 * stop * item // block) * block, numel)
            found = []
            for first, last, codes, scales in coded(begin, end):
                assert codes is not None
                found.append(codes)
                measure(first, last, codes, scales)
            data = torch.cat(found)[start * item - begin // 2 : stop * item - begin // 2]
            return data.clone().view(dtype)[:, None] if item > 1 else data[:, None]

        return read

    def _measure(self, device: str) -> Callable[[int, int, torch.Tensor, torch.Tensor], None]:
        """What tells the gauge of codes and scales of the blocks from element `begin` to `end`."""
        from regraft.kernels.four_bit import decode, pair_table

        gauge, block, pairs = self.gauge, self.state.block_size, pair_table(TABLES[self.state.quant_type], device)
        if gauge is None:
            return lambda begin, end, codes, scales: None
        wanted, base = (flat_pieces(tensor, block, device) for tensor in (self.sources[0], gauge.base))
        read_back = self._read_back(device)

        def measure(begin: int, end: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
            if read_back is not None:
                scales = read_back(begin // block, -(-end // block))
            found = decode(codes, scales, pairs, block, end - begin)
            for (first, last, values), (_, _, before) in zip(wanted(begin, end), base(begin, end), strict=True):
                gauge.add(first, values.float() - before, found[first - begin : last - begin] - before)

        return measure

    def _read_back(self, device: str) -> RowReader | None:
        """The scales as they are after their own quantisation; None if they have none."""
        if self.stored is None:
            return None
        from regraft.kernels.four_bit import decode_scales

        nested, nested_map = _nested(self.stored)
        table, find = nested_map.load(device), _all_scales(self, self.stored, device)

        def decoded() -> torch.Tensor:
            codes, scales, offset = find()
            return decode_scales(codes, scales, table, nested.block_size, offset)

        return held(decoded)


def _nested(stored: FourBitTensor) -> tuple[Nested, LazyTensor]:
    """How the scales are quantised, and the values of their codes."""
    assert stored.state.nested is not None
    assert stored.nested_map is not None
    return stored.state.nested, stored.nested_map


def _all_scales(
    part: _FourBitPart, stored: FourBitTensor, device: str
) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What finds the scales of the whole weight and quantises them, once; those of `stored` keep their codes."""
    import torch

    from regraft.kernels.four_bit import encode_scales

    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    nested, nested_map = _nested(stored)

    def compute() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if found:
            return found[0]
        scales = part._scales(device)(0, num_blocks(part.state))
        if part.state == stored.state and torch.equal(scales, stored.open_scales(device)(0, len(scales))):
            assert stored.nested_scales is not None
            offset = torch.tensor(nested.offset, dtype=torch.float32)
            found.append((stored.scales.load(device), stored.nested_scales.load(device), offset))
        else:
            found.append(encode_scales(scales, nested_map.load(device), nested.block_size))
        return found[0]

    return compute


class FourBitScales(_FourBitPart):
    """The scale of each block, fp32 [ceil(elements / block size)]."""

    def __init__(self, weight: LazyTensor, state: State) -> None:
        super().__init__(TensorSpec(f"{weight.spec.name}.absmax", "F32", (num_blocks(state),)), weight, state)

    def open(self, device: str = "cpu") -> RowReader:
        """The largest magnitudes of the blocks."""
        return self._scales(device)


class _DoublePart(_FourBitPart):
    """A part of a 4-bit weight whose scales are quantised in their turn: all of them are found at the first read."""

    def __init__(self, spec: TensorSpec, weight: LazyTensor, state: State, stored: FourBitTensor) -> None:
        super().__init__(spec, weight, state)
        self.stored = stored

    @property
    def held_bytes(self) -> int:
        """Also the scales of the whole weight, before and after."""
        return super().held_bytes + 12 * num_blocks(self.state)

    def open(self, device: str = "cpu") -> RowReader:
        """Slices of what all scales together give."""
        read = _all_scales(self, self.stored, device)
        return held(lambda: self._of(*read()))

    def _of(self, codes: torch.Tensor, scales: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class ScaleCodes(_DoublePart):
    """The codes of the scales, uint8 [ceil(elements / block size)]."""

    def __init__(self, weight: LazyTensor, state: State, stored: FourBitTensor) -> None:
        spec = TensorSpec(f"{weight.spec.name}.absmax", "U8", (num_blocks(state),))
        super().__init__(spec, weight, state, stored)

    def _of(self, codes: torch.Tensor, scales: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return codes


class NestedScales(_DoublePart):
    """The scales of the scales, fp32 [ceil(scales / nested block size)]."""

    def __init__(self, weight: LazyTensor, state: State, stored: FourBitTensor) -> None:
        blocks = -(-num_blocks(state) // _nested(stored)[0].block_size)
        spec = TensorSpec(f"{weight.spec.name}.nested_absmax", "F32", (blocks,))
        super().__init__(spec, weight, state, stored)

    def _of(self, codes: torch.Tensor, scales: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return scales


class StateText(_DoublePart):
    """The JSON text of the state, as bytes. It names the mean of the scales, whose digits are known only when they are;
    so the text is filled up with spaces, which JSON ignores, to a length known at plan time, a multiple of 8.
    """

    def __init__(self, weight: LazyTensor, state: State, stored: FourBitTensor) -> None:
        spec = TensorSpec(f"{weight.spec.name}{STATE_MARK}{state.quant_type}", "U8", (-(-state.longest // 8) * 8,))
        super().__init__(spec, weight, state, stored)

    def _of(self, codes: torch.Tensor, scales: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        import torch

        state = replace(self.state, nested=replace(_nested(self.stored)[0], offset=offset.item()))
        return torch.frombuffer(bytearray(state.dump().ljust(self.spec.numel)), dtype=torch.uint8)

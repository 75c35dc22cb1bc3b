"""The tensors that store one weight in 8 bits, as bitsandbytes does: codes, and the largest magnitude of each row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from regraft.core.dequantised import INT8_STEP
from regraft.core.derived import open_rows
from regraft.core.quantised_parts import Part, row_pieces
from regraft.core.realised import Gauge
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch


class Int8Codes(Part):
    """Codes of an 8-bit weight, int8 [rows, columns].

    Args:
        weight: float values.
        gauge: told what the codes keep.
    """

    def __init__(self, weight: LazyTensor, gauge: Gauge | None = None) -> None:
        super().__init__(replace(weight.spec, dtype="I8"), weight)
        self.gauge = gauge

    @property
    def held_bytes(self) -> int:
        """Also the base that the gauge compares with."""
        return super().held_bytes + (self.gauge.base.held_bytes if self.gauge else 0)

    def open(self, device: str = "cpu") -> RowReader:
        """Rounds `127 · value / scale`."""
        import torch

        pieces, gauge = row_pieces(self.sources[0], device), self.gauge
        base = open_rows(gauge.base, device) if gauge else None

        def coded(first: int, last: int, values: torch.Tensor) -> torch.Tensor:
            halves = values.half()
            scales = halves.abs().amax(dim=1).float()
            factors = torch.where(scales > 0, 127.0 / scales, 0.0)
            codes = halves.float().mul_(factors[:, None]).round_().to(torch.int8)
            if gauge is not None and base is not None:
                before = base(first, last)
                found = codes.float().mul_(scales[:, None]).mul_(INT8_STEP)
                gauge.add(first, values.float() - before, found - before)
            return codes

        return lambda start, stop: torch.cat([coded(*piece) for piece in pieces(start, stop)])


class Int8Scales(Part):
    """The largest magnitude of each row, fp32 [rows]."""

    def __init__(self, weight: LazyTensor, name: str) -> None:
        super().__init__(TensorSpec(name, "F32", weight.spec.shape[:1]), weight)

    def open(self, device: str = "cpu") -> RowReader:
        """Of the values in float16, as the codes are: bitsandbytes casts before all else."""
        import torch

        pieces = row_pieces(self.sources[0], device)
        return lambda start, stop: torch.cat(
            [values.half().abs().amax(dim=1).float() for _, _, values in pieces(start, stop)]
        )

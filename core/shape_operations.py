"""Operations that change shapes: axes put together from pieces of the input's, and tensors of one number.

They read one input and round once. Pieces that are only moved keep their bits; a piece that is halved gives two that
sum to it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from regraft.core.errors import PluginError
from regraft.core.operations import Operation, RowFunction
from regraft.core.tensors import LazyTensor

if TYPE_CHECKING:
    import torch

Half = Literal["", "first", "second"]

_BLOCK = 1 << 20
"""Elements whose random numbers are worked out together; eight bytes each, a few times."""


@dataclass(frozen=True)
class Span:
    """A run of places along an axis of the output.

    Args:
        count: how many.
        start: the first place of the input that they come from; None for places that are filled.
        scale: a factor.
        half: the first or the second of two pieces that sum to the input's; see `Resize`.
    """

    count: int
    start: int | None = None
    scale: float = 1.0
    half: Half = ""

    @property
    def stop(self) -> int:
        """Behind the last place of the input; 0 where nothing is read."""
        return 0 if self.start is None else self.start + self.count

    def moved(self, by: int) -> Span:
        """The same span of an axis on which the input begins `by` places later."""
        return self if self.start is None else replace(self, start=self.start + by)


Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Resize(Operation):
    """Each named axis of the output is the concatenation of spans of the input's; other axes stay. No axis: a copy.

    Scales act on `in + offset`: `out = scale · (in + offset) - offset`, in fp32 (float64 for a float64 input). The two
    halves of an element w are `b = round(w (1/2 + noise |u|))` in the input's dtype and `w - b`, which is exact
    (Sterbenz: w/2 <= b <= w). u is uniform in [-1, 1), drawn for each element by its place and the seed; its sign says
    which half is `b`.

    Args:
        input: name of the tensor.
        axes: spans by axis.
        fill: what filled places hold.
        offset: 1 for norms that store w - 1, else 0.
        noise: 0 to 1/2; how far the halves part, in units of w.
        seed: of u.
    """

    input: str
    axes: Mapping[int, Spans]
    fill: float = 0.0
    offset: float = 0.0
    noise: float = 0.0
    seed: int = 0
    kind: ClassVar[str] = "resize"

    @property
    def row_local(self) -> bool:  # type: ignore[override]
        """Whether the first axis stays."""
        return 0 not in self.axes

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one input."""
        return (self.input,)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The spans as [count, start, scale, half] by axis, and the numbers."""
        axes = {
            str(axis): [[span.count, span.start, span.scale, span.half] for span in spans]
            for axis, spans in sorted(self.axes.items())
        }
        return {"axes": axes, "fill": self.fill, "offset": self.offset, "noise": self.noise, "seed": self.seed}

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The output's shape, given the input's."""
        return tuple(
            sum(span.count for span in self.axes[axis]) if axis in self.axes else extent
            for axis, extent in enumerate(shape)
        )

    def prepare(self, device: str) -> RowFunction:
        """Halve, then take and scale axis by axis. Halving comes first: u belongs to places of the input."""
        order = sorted(self.axes, key=lambda axis: not any(span.half for span in self.axes[axis]))

        def resize(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            del stop
            for axis in order:
                rows = self._along(rows, axis, 0 if 0 in self.axes else start)
            return rows

        return resize

    def _along(self, rows: torch.Tensor, axis: int, first: int) -> torch.Tensor:
        import torch

        spans, extent = self.axes[axis], rows.shape[axis]
        if (stop := max(span.stop for span in spans)) > extent:
            raise PluginError("a span ends behind its axis", where=f"{self.input}, axis {axis}",
                              expected=f"at most {extent}", found=stop)  # fmt: skip
        taken = torch.cat([self._piece(rows, axis, span, first) for span in spans], axis)
        if all(span.scale == 1.0 for span in spans):
            return taken
        wide = taken if taken.dtype == torch.float64 else taken.float()
        scales = [torch.full((span.count,), span.scale, dtype=wide.dtype, device=wide.device) for span in spans]
        factors = torch.cat(scales).view(-1, *[1] * (wide.dim() - 1 - axis))
        return (wide + self.offset) * factors - self.offset if self.offset else wide * factors

    def _piece(self, rows: torch.Tensor, axis: int, span: Span, first: int) -> torch.Tensor:
        if span.start is None:
            return rows.new_full((*rows.shape[:axis], span.count, *rows.shape[axis + 1 :]), self.fill)
        piece = rows.narrow(axis, span.start, span.count)
        if not span.half:
            return piece
        origin = [0] * rows.dim()
        origin[axis] = span.start
        origin[0] += first
        return self._half(piece, rows.shape[1:], origin, span.half)

    def _half(self, piece: torch.Tensor, widths: Sequence[int], origin: Sequence[int], half: Half) -> torch.Tensor:
        import torch

        step = max(1, _BLOCK // max(1, math.prod(piece.shape[1:])))
        blocks = []
        for number, block in enumerate(torch.split(piece, step)):
            u = _uniform(block, widths, [origin[0] + number * step, *origin[1:]], self.seed)
            wide = block if block.dtype == torch.float64 else block.float()
            larger = (wide * (0.5 + self.noise * u.abs().to(wide.dtype))).to(block.dtype)
            smaller = (wide - larger.to(wide.dtype)).to(block.dtype)
            blocks.append(torch.where((u >= 0) == (half == "first"), larger, smaller))
        return torch.cat(blocks)

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> Resize:
        """From a saved patch."""
        axes = {
            int(axis): tuple(_restored(*item) for item in spans) for axis, spans in dict(parameters["axes"]).items()
        }
        if min(axes, default=0) < 0 or not all(axes.values()):
            raise ValueError("an axis without spans")
        fill, offset, noise = (float(parameters[name]) for name in ("fill", "offset", "noise"))
        return cls(inputs[0], axes, fill, offset, noise, int(parameters["seed"]))


def _restored(count: int, start: int | None, scale: float, half: Half) -> Span:
    if count < 0 or (start is not None and start < 0) or half not in ("", "first", "second"):
        raise ValueError(f"no span: {[count, start, scale, half]}")
    return Span(int(count), None if start is None else int(start), float(scale), half)


def _uniform(block: torch.Tensor, widths: Sequence[int], origin: Sequence[int], seed: int) -> torch.Tensor:
    """Numbers in [-1, 1), float64, for the elements of `block` by their places in the input: 32 bits of MurmurHash3's
    finaliser. The same whatever the device and however the input is cut.

    Args:
        block: elements of the input.
        widths: the input's extents but the first.
        origin: where the block begins in the input, along each axis.
        seed: any whole number.
    """
    import torch

    mask = 0xFFFFFFFF
    place = torch.zeros(1, dtype=torch.int64, device=block.device)
    for axis, (extent, begin) in enumerate(zip(block.shape, origin, strict=True)):
        steps = torch.arange(begin, begin + extent, device=block.device) * math.prod(widths[axis:])
        place = place + steps.view(-1, *[1] * (block.dim() - 1 - axis))
    mixed = (place * 0x9E3779B1 + (seed * 0x85EBCA77 & mask)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
    return (mixed ^ (mixed >> 16)).double() / 2**31 - 1.0


@dataclass(frozen=True)
class Constant(Operation):
    """A tensor of one number; reads nothing.

    Args:
        shape: of the output.
        value: the number.
    """

    shape: tuple[int, ...]
    value: float = 0.0
    kind: ClassVar[str] = "constant"

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Shape and number."""
        return {"shape": list(self.shape), "value": self.value}

    def prepare(self, device: str) -> RowFunction:
        """Rows of the number."""
        import torch

        return lambda start, stop: torch.full((stop - start, *self.shape[1:]), self.value, device=device)

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> Constant:
        """From a saved patch."""
        return cls(tuple(int(extent) for extent in parameters["shape"]), float(parameters["value"]))

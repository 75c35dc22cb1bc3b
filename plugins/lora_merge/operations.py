"""Edits that are more than a low-rank delta: DoRA's magnitudes, biases, and experts that one tensor stacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.core.operations import Operation, RowFunction
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MagnitudeDelta(Operation):
    """DoRA: every output vector of `W + s·(L @ R)` with the length of its magnitude, in fp32.

    Args:
        input: name of the weight W [rows, cols].
        left: [rows, rank].
        right: [rank, cols].
        magnitude: [rows], or [cols] if `by_column`.
        scale: s.
        by_column: the outputs are the columns; then the tensor is computed whole.
        seed: as `LowRankDelta`.
    """

    input: str
    left: LazyTensor
    right: LazyTensor
    magnitude: LazyTensor
    scale: float
    by_column: bool = False
    seed: int | None = None

    @property
    def row_local(self) -> bool:  # type: ignore[override]
        """Whether the outputs are the rows."""
        return not self.by_column

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The weight."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """Factors and magnitudes."""
        return {"left": self.left, "right": self.right, "magnitude": self.magnitude}

    def prepare(self, device: str) -> RowFunction:
        """Load the operands in fp32."""
        from regraft.kernels.stochastic import round_stochastically
        from regraft.plugins.lora_merge.math import wide_sum, with_magnitude

        left, right = self.left.load(device).float(), self.right.load(device).float()
        magnitude = self.magnitude.load(device).float()

        def rescale(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            total = wide_sum(rows, left[start:stop], right, self.scale)
            lengths = magnitude if self.by_column else magnitude[start:stop]
            total = with_magnitude(total, lengths, by_column=self.by_column)
            return total if self.seed is None else round_stochastically(total, rows.dtype, self.seed, start)

        return rescale


@dataclass(frozen=True)
class AddScaled(Operation):
    """`out = b + s·v` in fp32, or float64 for a bias in it: a bias and the bias of `lora_B`.

    Args:
        input: name of the bias b [n].
        vector: v [n].
        scale: s.
    """

    input: str
    vector: LazyTensor
    scale: float

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The bias."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The vector."""
        return {"vector": self.vector}

    def prepare(self, device: str) -> RowFunction:
        """Load the vector; it is scaled as wide as it is added."""
        import torch

        vector = self.vector.load(device)

        def added(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            wide = torch.promote_types(rows.dtype, torch.float32)
            return rows.to(wide) + vector[start:stop].to(wide) * self.scale

        return added


@dataclass(frozen=True)
class StackedDelta(Operation):
    """`out[e] = round(W[e] + s·(L_e @ R_e))` for every expert e of a tensor that stacks them.

    peft keeps the factors of all experts in one matrix each: `right` holds the rank rows of expert after expert, while
    in `left` the experts alternate from column to column.

    Args:
        input: name of the weight W [experts, rows, cols].
        left: [rows, rank · experts].
        right: [experts · rank, cols].
        scale: s.
        experts: their number.
        seed: as `LowRankDelta`, for the experts one below the other.
    """

    input: str
    left: LazyTensor
    right: LazyTensor
    scale: float
    experts: int
    seed: int | None = None

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The weight."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The two factors."""
        return {"left": self.left, "right": self.right}

    def prepare(self, device: str) -> RowFunction:
        """Load the factors in fp32."""
        import torch

        from regraft.kernels.lora_merge import Merge, lora_merge_group

        left, right = self.left.load(device).float(), self.right.load(device).float()
        rank = right.shape[0] // self.experts

        def update(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            parts = [
                Merge(
                    rows[expert - start],
                    left[:, expert :: self.experts].contiguous(),
                    right[expert * rank : (expert + 1) * rank],
                    self.scale,
                    self.seed,
                    expert * rows.shape[1],
                )
                for expert in range(start, stop)
            ]
            return torch.stack(lora_merge_group(parts))

        return update


class Window(LazyTensor):
    """Some rows of a matrix, and of these every `step`-th column from `column` on: one expert's share of its factors.

    Args:
        tensor: the matrix.
        start, stop: its rows.
        column, step: its columns.
    """

    def __init__(self, tensor: LazyTensor, start: int, stop: int, column: int = 0, step: int = 1) -> None:
        columns = len(range(column, tensor.spec.shape[1], step))
        self.spec = TensorSpec(tensor.spec.name, tensor.spec.dtype, (stop - start, columns))
        self.tensor = tensor
        self._start = start
        self._columns = slice(column, None, step)

    def open(self, device: str = "cpu") -> RowReader:
        """Reads the rows and keeps the columns."""
        read = self.tensor.open(device)
        return lambda start, stop: read(self._start + start, self._start + stop)[:, self._columns].contiguous()


@dataclass(frozen=True)
class Rebased(Operation):
    """Another operation, on a tensor that the adapter brings in place of the checkpoint's.

    Args:
        operation: what is done to it; takes one input.
        base: the tensor, in the dtype of the output.
    """

    operation: Operation
    base: LazyTensor

    @property
    def row_local(self) -> bool:  # type: ignore[override]
        """As the operation."""
        return self.operation.row_local

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """Those of the operation; the base is read row by row."""
        return self.operation.operands

    def prepare(self, device: str) -> RowFunction:
        """Prepare the operation and open the base."""
        function, read = self.operation.prepare(device), self.base.open(device)
        return lambda start, stop: function(start, stop, read(start, stop))

"""`out[i] = Σ_j w_ij · in[s_ij]`: new embeddings and heads from old rows, by gathering, appending and averaging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

from regraft.core.errors import PluginError
from regraft.core.operations import Operation, RowFunction
from regraft.core.specs import torch_dtype
from regraft.core.tensors import LazyTensor, MemoryTensor

if TYPE_CHECKING:
    import torch

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RowMap(Operation):
    """Rows of the output as weighted sums of rows of the input; a row that is one row of it is copied bit for bit.

    Sums are in fp32 (float64 for a float64 input), in the order in which the parts are given, rounded once. A row
    without parts is zero.

    Args:
        input: name of the tensor [rows, ...].
        starts: int64 [outputs + 1], from 0 on; row i has parts `starts[i]` to `starts[i + 1]`.
        sources: int64 [parts], rows of the input, or, from its last row on, rows of `brought`.
        weights: fp32 [parts]; None: each row is the mean of its parts.
        brought: [n, ...] rows that the step brings along, such as trained ones, in any float dtype.
    """

    input: str
    starts: LazyTensor
    sources: LazyTensor
    weights: LazyTensor | None = None
    brought: LazyTensor | None = None
    kind: ClassVar[str] = "row-map"
    row_local: ClassVar[bool] = False

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one input."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """Which rows, how much of each, and rows that are new."""
        found = {"starts": self.starts, "sources": self.sources, "weights": self.weights, "brought": self.brought}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def prepare(self, device: str) -> RowFunction:
        """Load the map."""
        starts, sources = self.starts.load(device), self.sources.load(device)
        weights = None if self.weights is None else self.weights.load(device)
        brought = None if self.brought is None else self.brought.load(device)

        def mapped(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            table = _Rows(rows, brought)
            if len(sources) and not 0 <= int(sources.min()) <= int(sources.max()) < table.count:
                found = f"rows {int(sources.min())} to {int(sources.max())}"
                raise PluginError("a row map names rows that do not exist", where=self.input,
                                  expected=f"0 to {table.count - 1}", found=found)  # fmt: skip
            return _combined(table, starts[start : stop + 1], sources, weights, rows.dtype)

        return mapped

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> RowMap:
        """From a saved patch."""
        return cls(inputs[0], operands["starts"], operands["sources"], operands.get("weights"), operands.get("brought"))


def row_map(
    name: str,
    parts: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None = None,
    brought: LazyTensor | None = None,
) -> RowMap:
    """The map in which row i is made of rows `parts[i]` of the tensor `name`, with `weights[i]`, or their mean."""
    import torch

    def memory(role: str, values: Sequence[Any], dtype: str) -> LazyTensor:
        return MemoryTensor(role, torch.tensor(values, dtype=torch_dtype(dtype)))

    flat = [weight for row in weights for weight in row] if weights is not None else None
    return RowMap(
        name,
        memory("starts", list(accumulate(map(len, parts), initial=0)), "I64"),
        memory("sources", [source for row in parts for source in row], "I64"),
        None if flat is None else memory("weights", flat, "F32"),
        brought,
    )


class _Rows:
    """Rows of the input, and behind them those brought along."""

    def __init__(self, rows: torch.Tensor, brought: torch.Tensor | None) -> None:
        self.rows, self.brought = rows, brought
        self.count = len(rows) + (0 if brought is None else len(brought))

    def take(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[n, ...] the rows of these indices."""
        if self.brought is None:
            return self.rows[indices].to(dtype)
        own = indices < len(self.rows)
        out = self.rows[indices.clamp(max=len(self.rows) - 1)].to(dtype)
        out[~own] = self.brought[indices[~own] - len(self.rows)].to(dtype)
        return out


def _combined(
    table: _Rows, starts: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """[outputs, ...] in the input's dtype, in pieces of some thousand rows."""
    import torch

    out = torch.empty(len(starts) - 1, *table.rows.shape[1:], dtype=dtype, device=starts.device)
    for begin in range(0, len(out), _ROWS_AT_ONCE):
        bounds = starts[begin : begin + _ROWS_AT_ONCE + 1]
        used = slice(int(bounds[0]), int(bounds[-1]))
        share = None if weights is None else weights[used]
        out[begin : begin + len(bounds) - 1] = _sums(table, sources[used], bounds.diff(), share, dtype)
    return out


def _sums(
    table: _Rows, indices: torch.Tensor, lengths: torch.Tensor, share: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """[rows, ...]: the first part of every row, plus the second of those that have one, and so on.

    A first part is put, not added, so that a row with a single one keeps its bits, the sign of a zero included.
    """
    import torch

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = table.rows.shape[1:]
    sums = torch.zeros(len(lengths), *shape, dtype=wide, device=lengths.device)
    first = lengths.cumsum(0) - lengths
    for place in range(int(lengths.max())):
        rows = (lengths > place).nonzero().flatten()
        at = first[rows] + place
        part = table.take(indices[at], wide)
        if share is not None:
            part *= share[at].to(wide).view(-1, *[1] * len(shape))
        sums[rows] = part if place == 0 else sums[rows] + part
    if share is None:
        sums /= lengths.clamp(min=1).to(wide).view(-1, *[1] * len(shape))
    return sums

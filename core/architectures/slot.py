"""Where one role of a model is stored: which tensor, which of its rows, in which orientation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Slot:
    """The place of a role in a checkpoint.

    `rows` counts along the OUTPUT dimension of the stored tensor, which is its first dimension unless `transposed`. A
    fused tensor gives each of its roles some of its rows: one run where the roles stand one after another (phi3,
    gpt2), one run per key-value group where they alternate (gpt_neox, falcon). The runs are in the role's own order,
    so the concatenated runs are the matrix of an unfused model.

    Args:
        role: what is stored here, such as `q_proj`.
        tensor: name of the weight in the checkpoint.
        shape: the whole tensor as stored, in the extents that config.json implies.
        rows: runs of output rows that belong to the role.
        bias: name of the bias in the checkpoint, whose elements `rows` counts as well; None if the config gives none.
        bias_switch: key of config.json that decides on a bias; None if the family always or never has one.
        transposed: stored as (in_features, out_features), like GPT-2's Conv1D.
        tied: the tensor serves the embeddings and the head alike.
        expert: position along the first dimension of a tensor that stacks all experts; None for an unstacked tensor.
        module: path of the module, or of the stacked parameter, in the stock class; None where that has no such module.
    """

    role: str
    tensor: str
    shape: tuple[int, ...]
    rows: tuple[slice, ...]
    bias: str | None = None
    bias_switch: str | None = None
    transposed: bool = False
    tied: bool = False
    expert: int | None = None
    module: str | None = None

    @property
    def row_axis(self) -> int:
        """Axis of the stored tensor along which `rows` counts."""
        return (1 if self.transposed else 0) + (self.expert is not None)

    @property
    def column_axis(self) -> int | None:
        """Axis of the stored tensor that takes the input; None for a vector."""
        if len(self.shape) == 1:
            return None
        return (0 if self.transposed else 1) + (self.expert is not None)

    @property
    def num_rows(self) -> int:
        """Output features of the role."""
        return sum(run.stop - run.start for run in self.rows)

    @property
    def num_columns(self) -> int | None:
        """Input features of the role; None for a vector."""
        return None if self.column_axis is None else self.shape[self.column_axis]

    @property
    def whole(self) -> bool:
        """Whether the tensor holds this role and nothing else."""
        return self.expert is None and self.rows == (slice(0, self.shape[self.row_axis]),)

    def row_indices(self) -> list[int]:
        """Every output row of the role in the stored tensor, in the role's own order."""
        return list(chain.from_iterable(range(run.start, run.stop) for run in self.rows))

    def span(self, start: int, stop: int) -> slice:
        """Stored rows of the role's own rows `start` to `stop`, which must lie within one run.

        Raises:
            ValueError: they do not.
        """
        offset = 0
        for run in self.rows:
            length = run.stop - run.start
            if offset <= start and stop <= offset + length:
                return slice(run.start + start - offset, run.start + stop - offset)
            offset += length
        raise ValueError(f"rows {start} to {stop} of {self.role} do not stand together in {self.tensor}")

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        """The role's part of the stored weight, as (out_features, in_features), or (features,) for a vector.

        A view where the layout allows one, a copy where rows alternate.
        """
        matrix = stored if self.expert is None else stored[self.expert]
        return self._gather(matrix.T if self.transposed else matrix)

    def write(self, stored: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A copy of the stored weight in which this role's part is `part`, oriented as `read` gives it."""
        written = stored.clone()
        matrix = written if self.expert is None else written[self.expert]
        self._scatter(matrix.T if self.transposed else matrix, part)
        return written

    def read_bias(self, stored: torch.Tensor) -> torch.Tensor:
        """The role's part (out_features,) of the stored bias."""
        return self._gather(stored)

    def write_bias(self, stored: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A copy of the stored bias in which this role's part is `part`."""
        written = stored.clone()
        self._scatter(written, part)
        return written

    def _gather(self, matrix: torch.Tensor) -> torch.Tensor:
        if len(self.rows) == 1:
            return matrix[self.rows[0]]
        return matrix[self.row_indices()]

    def _scatter(self, matrix: torch.Tensor, part: torch.Tensor) -> None:
        offset = 0
        for run in self.rows:
            length = run.stop - run.start
            matrix[run] = part[offset : offset + length]
            offset += length


def consecutive(sizes: Iterable[int]) -> list[tuple[slice, ...]]:
    """Runs of roles that stand one after another, given the number of rows of each."""
    runs: list[tuple[slice, ...]] = []
    start = 0
    for size in sizes:
        runs.append((slice(start, start + size),))
        start += size
    return runs


def grouped(num_heads: int, num_kv_heads: int, head_dim: int) -> list[tuple[slice, ...]]:
    """Runs of q, k and v where every key-value group stores its query heads, then its key, then its value head."""
    query_rows = num_heads // num_kv_heads * head_dim
    group_rows = query_rows + 2 * head_dim
    starts = [group * group_rows for group in range(num_kv_heads)]
    key = query_rows
    value = query_rows + head_dim
    return [
        tuple(slice(start, start + query_rows) for start in starts),
        tuple(slice(start + key, start + value) for start in starts),
        tuple(slice(start + value, start + group_rows) for start in starts),
    ]

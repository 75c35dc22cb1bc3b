"""Pruning as an operation: the entries of matrices that count least become zero; everything else keeps its bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from regraft.core.operations import Operation, RowFunction
from regraft.core.tensors import LazyTensor

if TYPE_CHECKING:
    import torch

Runs = tuple[tuple[int, int], ...]
"""(start, stop) of output rows of a stored tensor: one matrix, in the matrix's own order."""


@dataclass(frozen=True)
class Sparsity:
    """How many entries go, and among which.

    Args:
        ratio: int(ratio · n) of every n entries that are compared go; for a pattern, not used.
        whole: compare all entries of a matrix, not those of one output row.
        keep, group: if `group` is not 0: of every `group` inputs of a row, one behind the other, `keep` stay.
    """

    ratio: float = 0.0
    whole: bool = False
    keep: int = 0
    group: int = 0

    def count(self, rows: int, columns: int) -> int:
        """Entries of a matrix [rows, columns] that go."""
        if self.group:
            return rows * (columns // self.group) * (self.group - self.keep)
        return int(rows * columns * self.ratio) if self.whole else rows * int(columns * self.ratio)

    def lowest(self, scores: torch.Tensor) -> torch.Tensor:
        """Which entries go, [rows, columns] bool, by their scores. Of equal ones the first go."""
        if self.group:
            return lowest(scores.reshape(-1, self.group), self.group - self.keep).view_as(scores)
        if self.whole:
            return lowest(scores.reshape(1, -1), self.count(*scores.shape)).view_as(scores)
        return lowest(scores, int(scores.shape[1] * self.ratio))


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool [rows, columns]: in each row the `count` lowest scores, of equal ones the first.

    As a stable sort gives it, in less time: a threshold is selected for every row, and only ties with it are counted.
    """
    import torch

    if count == 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, 1, keepdim=True).values
    below, ties = scores < threshold, scores == threshold
    missing = count - below.sum(1, keepdim=True)
    if bool((ties.sum(1, keepdim=True) > missing).any()):
        ties &= ties.cumsum(1) <= missing
    return below | ties


@dataclass(frozen=True)
class ZeroLowest(Operation):
    """`out[i, j] = 0` where the score `|in[i, j]| · norm[j]` is among the lowest of its row or matrix, else `in[i, j]`.

    Scores are computed in fp32 (float64 for a float64 input). With several norms, each gives a mask, and what goes is
    what all masks agree on.

    Args:
        input: name of the weight: [outputs, inputs], or [experts, outputs, inputs].
        sparsity: how many go.
        matrices: output rows of the matrices in it that are pruned; others stay as they are.
        norms: [inputs], any float dtype; none for norms of 1.
        transposed: the weight is stored as [inputs, outputs], like GPT-2's Conv1D.
    """

    input: str
    sparsity: Sparsity
    matrices: tuple[Runs, ...]
    norms: tuple[LazyTensor, ...] = ()
    transposed: bool = False
    kind: ClassVar[str] = "zero-lowest"

    @property
    def row_local(self) -> bool:  # type: ignore[override]
        """Whether entries are compared within output rows, and these are the stored rows. Experts never share any."""
        return not (self.sparsity.whole or self.transposed)

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The weight."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The norms, by number."""
        return {str(number): norm for number, norm in enumerate(self.norms)}

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The numbers."""
        return {
            "ratio": self.sparsity.ratio,
            "whole": self.sparsity.whole,
            "keep": self.sparsity.keep,
            "group": self.sparsity.group,
            "matrices": [[list(run) for run in runs] for runs in self.matrices],
            "transposed": self.transposed,
        }

    def prepare(self, device: str) -> RowFunction:
        """Load the norms."""
        norms = [norm.load(device) for norm in self.norms]

        def prune(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            out = rows.clone()
            for matrix in out if rows.dim() == 3 else (out,):  # experts one by one
                first, last = (0, matrix.shape[-1 if self.transposed else 0]) if rows.dim() == 3 else (start, stop)
                self._prune(matrix.T if self.transposed else matrix, first, last, norms)
            return out

        return prune

    def _prune(self, matrix: torch.Tensor, start: int, stop: int, norms: Sequence[torch.Tensor]) -> None:
        """Zero entries of `matrix`, output rows `start` to `stop` of the tensor, in place."""
        import torch

        if self.transposed:
            start, stop = 0, len(matrix)
        for runs in self.matrices:
            cut = [(max(first, start) - start, min(last, stop) - start) for first, last in runs]
            pieces = [slice(*run) for run in cut if run[0] < run[1]]
            if not pieces:
                continue
            weights = torch.cat([matrix[piece] for piece in pieces])
            weights.masked_fill_(pruned(weights, self.sparsity, norms), 0)
            offset = 0
            for piece in pieces:
                length = piece.stop - piece.start
                matrix[piece] = weights[offset : offset + length]
                offset += length

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> ZeroLowest:
        """From a saved patch."""
        ratio, keep, group = float(parameters["ratio"]), int(parameters["keep"]), int(parameters["group"])
        if not (0 <= ratio < 1 and 0 <= keep <= group):
            raise ValueError(f"no sparsity: {ratio}, {keep} of {group}")
        matrices = tuple(tuple((int(start), int(stop)) for start, stop in runs) for runs in parameters["matrices"])
        norms = tuple(operands[str(number)] for number in range(len(operands)))
        sparsity = Sparsity(ratio, bool(parameters["whole"]), keep, group)
        return cls(inputs[0], sparsity, matrices, norms, bool(parameters["transposed"]))


def scores(weights: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
    """`|W_ij| · norm_j` [outputs, inputs], in fp32 or wider."""
    import torch

    size = weights.abs() if weights.dtype == torch.float64 else weights.abs().float()
    return size if norm is None else size * norm.to(size.dtype)


def pruned(weights: torch.Tensor, sparsity: Sparsity, norms: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Which entries of the matrix `weights` [outputs, inputs] go: those that the masks of all `norms` agree on."""
    masks = [sparsity.lowest(scores(weights, norm)) for norm in norms or (None,)]
    agreed = masks[0]
    for mask in masks[1:]:
        agreed = agreed & mask
    return agreed

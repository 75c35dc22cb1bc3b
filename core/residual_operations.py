"""The algebra of constant offsets: biases that take them up, and projections whose input columns are scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from regraft.core.buffers import CHUNK_BYTES
from regraft.core.derived import held, open_rows
from regraft.core.operations import Operation, RowFunction
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, RowReader, row_chunks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Term:
    """`scale · vector`, and where it goes.

    Args:
        vector: [entries], any float dtype.
        start: the entry of a bias, or the input feature of a projection, that the first of them belongs to.
        scale: a factor.
    """

    vector: LazyTensor
    start: int = 0
    scale: float = 1.0

    @property
    def stop(self) -> int:
        """Behind the last entry."""
        return self.start + self.vector.spec.rows

    def load(self, device: str) -> torch.Tensor:
        """`scale · vector` in float64."""
        return self.vector.load(device).double() * self.scale


@dataclass(frozen=True)
class BiasUpdate(Operation):
    """`out = bias + Σ s_i · v_i` in float64, rounded once; a vector of n entries adds to n entries of the bias.

    Args:
        terms: what is added.
        bias: name of the bias as it is; None to start from zeros.
    """

    terms: tuple[Term, ...]
    bias: str | None = None
    kind: ClassVar[str] = "bias-update"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The bias, if there is one."""
        return () if self.bias is None else (self.bias,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The vectors, by number."""
        return _vectors(self.terms)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Where each vector goes, and its factor."""
        return {"terms": _places(self.terms)}

    def prepare(self, device: str) -> RowFunction:
        """Load the vectors in float64."""
        import torch

        loaded = [(term.start, term.stop, term.load(device)) for term in self.terms]

        def update(start: int, stop: int, *bias: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(stop - start, dtype=torch.float64, device=device)
            if bias:
                total += bias[0]
            for first, last, vector in loaded:
                low, high = max(first, start), min(last, stop)
                if low < high:
                    total[low - start : high - start] += vector[low - first : high - first]
            return total

        return update

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> BiasUpdate:
        """From a saved patch."""
        return cls(_terms(parameters, operands), *inputs)


@dataclass(frozen=True)
class ScaleColumns(Operation):
    """`out[:, j] = in[:, j] · (1 + s · v_j)` in fp32 (float64 for a float64 input), rounded once.

    Columns that no term names are multiplied by 1, which changes no bit.

    Args:
        input: name of the weight [outputs, inputs].
        terms: what is added to the factors of the input features.
        num_columns: input features.
        transposed: the weight is stored as [inputs, outputs], like GPT-2's Conv1D.
    """

    input: str
    terms: tuple[Term, ...]
    num_columns: int
    transposed: bool = False
    kind: ClassVar[str] = "scale-columns"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The weight."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The vectors, by number."""
        return _vectors(self.terms)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Which features each vector scales, and its factor."""
        return {"terms": _places(self.terms), "num_columns": self.num_columns, "transposed": self.transposed}

    def prepare(self, device: str) -> RowFunction:
        """Work out the factor of every column in float64."""
        import torch

        factors = torch.ones(self.num_columns, dtype=torch.float64, device=device)
        for term in self.terms:
            factors[term.start : term.stop] += term.load(device)

        def scale(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            wide = rows if rows.dtype == torch.float64 else rows.float()
            factor = factors[start:stop, None] if self.transposed else factors
            return wide * factor.to(wide.dtype)

        return scale

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> ScaleColumns:
        """From a saved patch."""
        terms = _terms(parameters, operands)
        return cls(inputs[0], terms, int(parameters["num_columns"]), bool(parameters["transposed"]))


class Projection(LazyTensor):
    """`Σ s_i · W[:, columns_i] @ v_i`, [outputs] in float64: what offsets of a projection's input add to its output.

    W is read piece by piece, so memory does not depend on its size where it is row-local.

    Args:
        weight: W [outputs, inputs], or [inputs, outputs] if `transposed`.
        terms: the offsets, by the input feature where each starts.
        transposed: see `weight`.
    """

    def __init__(self, weight: LazyTensor, terms: tuple[Term, ...], *, transposed: bool = False) -> None:
        self.weight, self.terms, self.transposed = weight, terms, transposed
        self.sources = (weight,)
        self.spec = TensorSpec(weight.spec.name, "F64", (weight.spec.shape[1 if transposed else 0],))

    @property
    def row_local(self) -> bool:
        """Never: it is small, and computed at once."""
        return False

    @property
    def held_bytes(self) -> int:
        """The pieces of W in its own dtype and in float64, or the whole of it; the vectors and the result."""
        spec = self.weight.spec
        read = 6 * max(CHUNK_BYTES, spec.row_bytes) if self.weight.row_local else 5 * spec.nbytes
        vectors = sum(term.vector.held_bytes + 16 * term.vector.spec.numel for term in self.terms)
        return read + self.weight.held_bytes + vectors + 2 * self.spec.nbytes

    def open(self, device: str = "cpu") -> RowReader:
        """Reads W once."""
        return held(lambda: self._transposed(device) if self.transposed else self._straight(device))

    def _straight(self, device: str) -> torch.Tensor:
        import torch

        read, loaded = open_rows(self.weight, device), [term.load(device) for term in self.terms]
        total = torch.zeros(self.spec.shape, dtype=torch.float64, device=device)
        for start, stop in row_chunks(self.weight.spec):
            rows = read(start, stop)
            for term, vector in zip(self.terms, loaded, strict=True):
                total[start:stop] += rows[:, term.start : term.stop].double() @ vector
        return total

    def _transposed(self, device: str) -> torch.Tensor:
        import torch

        read = open_rows(self.weight, device)
        total = torch.zeros(self.spec.shape, dtype=torch.float64, device=device)
        for term in self.terms:
            total += term.load(device) @ read(term.start, term.stop).double()
        return total


def _vectors(terms: Sequence[Term]) -> dict[str, LazyTensor]:
    return {str(index): term.vector for index, term in enumerate(terms)}


def _places(terms: Sequence[Term]) -> list[dict[str, Any]]:
    return [{"start": term.start, "scale": term.scale} for term in terms]


def _terms(parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]) -> tuple[Term, ...]:
    return tuple(
        Term(operands[str(index)], int(place["start"]), float(place["scale"]))
        for index, place in enumerate(parameters["terms"])
    )

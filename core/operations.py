"""How an output tensor is computed from the tensors below it: pure functions with names, parameters and operands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from regraft.core.errors import PluginError
from regraft.core.specs import TensorSpec, torch_dtype
from regraft.core.tensors import ByteRange, LazyTensor, RowReader, check_rows

if TYPE_CHECKING:
    import torch

RowFunction = Callable[..., "torch.Tensor"]
"""Called with (start, stop, *input rows), gives output rows start..stop, [stop - start, ...], in any float dtype; the
caller rounds once."""


class Operation(ABC):
    """A pure function from input tensors to one output tensor.

    A row-local operation computes output rows start..stop from the same rows of its inputs and from its operands. Any
    other is called once, with whole inputs and the range of all rows.
    """

    kind: ClassVar[str] = ""
    """The name under which a saved patch stores the formula; an operation without one is saved by its values."""
    row_local: ClassVar[bool] = True
    inputs: tuple[str, ...] = ()

    @abstractmethod
    def prepare(self, device: str) -> RowFunction:
        """Load the operands onto `device` and return the function of rows; dropped when the tensor is done."""

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The tensors it brings along, by role."""
        return {}

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The numbers and names of its formula, as JSON values."""
        return {}

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> Operation:
        """Build it again from what a saved patch holds."""
        raise NotImplementedError(f"{cls.__name__} is saved by its values")


@dataclass(frozen=True)
class Value(Operation):
    """The output is a tensor that the operation brings along. Not computed: copied."""

    tensor: LazyTensor
    kind: ClassVar[str] = "value"

    @property
    def row_local(self) -> bool:  # type: ignore[override]
        """As the tensor."""
        return self.tensor.row_local

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The tensor."""
        return {"tensor": self.tensor}

    def prepare(self, device: str) -> RowFunction:
        """Rows of the tensor."""
        return self.tensor.open(device)

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> Value:
        """From a saved patch."""
        return cls(operands["tensor"])


@dataclass(frozen=True)
class Convert(Operation):
    """The input in another dtype; the caller's rounding does it."""

    input: str
    kind: ClassVar[str] = "convert"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one input."""
        return (self.input,)

    def prepare(self, device: str) -> RowFunction:
        """The identity; from bfloat16 by way of float32: the same bits, and float16 comes faster on a CPU (1.4 x)."""
        import torch

        return lambda start, stop, rows: rows.float() if rows.dtype == torch.bfloat16 else rows

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> Convert:
        """From a saved patch."""
        return cls(*inputs)


@dataclass(frozen=True)
class ScaleRows(Operation):
    """`out[i] = factors[i] · (in[i] + offset) - offset`, in fp32: scales whole rows of a weight or entries of a vector.

    Args:
        input: name of the tensor [rows, ...].
        factors: [rows], any float dtype.
        offset: 1 for norms that store w - 1 (Gemma's `(1 + w)` form), else 0.
    """

    input: str
    factors: LazyTensor
    offset: float = 0.0
    kind: ClassVar[str] = "scale-rows"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one input."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The factors."""
        return {"factors": self.factors}

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The offset."""
        return {"offset": self.offset}

    def prepare(self, device: str) -> RowFunction:
        """Scale in fp32."""
        factors = self.factors.load(device).float()

        def scale(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            if len(factors) < stop:
                raise PluginError("fewer factors than rows", where=self.input, expected=stop, found=len(factors))
            factor = factors[start:stop].view(-1, *[1] * (rows.dim() - 1))
            if self.offset:
                return (rows.float() + self.offset) * factor - self.offset
            return rows.float() * factor

        return scale

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> ScaleRows:
        """From a saved patch."""
        return cls(inputs[0], operands["factors"], float(parameters["offset"]))


def leaves(tensor: LazyTensor) -> dict[str, LazyTensor]:
    """The stored tensors that `tensor` is made of, by name; operands that a step brings along are not among them."""
    below = tensor.sources
    if isinstance(tensor, ComputedTensor):
        below += tensor.operation.tensor.sources if isinstance(tensor.operation, Value) else ()
    elif not below:
        return {tensor.spec.name: tensor}
    return {name: leaf for source in below for name, leaf in leaves(source).items()}


class ComputedTensor(LazyTensor):
    """The result of an operation on other lazy tensors, rounded once to the dtype of its spec."""

    def __init__(self, spec: TensorSpec, operation: Operation, inputs: tuple[LazyTensor, ...]) -> None:
        self.spec = spec
        self.operation = operation
        self.sources = inputs

    @property
    def row_local(self) -> bool:
        """Whether this operation and everything below it work row by row."""
        return self.operation.row_local and all(source.row_local for source in self.sources)

    @property
    def raw(self) -> ByteRange | None:
        """The bytes on disk, when the operation only brings a stored tensor along."""
        if not isinstance(self.operation, Value):
            return None
        brought = self.operation.tensor
        stored, wanted = (brought.spec.dtype, brought.spec.shape), (self.spec.dtype, self.spec.shape)
        return brought.raw if stored == wanted else None

    @property
    def held_bytes(self) -> int:
        """Operands (twice, for their fp32 copies), and what the readers of its inputs hold."""
        operands = sum(2 * tensor.spec.nbytes for tensor in self.operation.operands.values())
        if isinstance(self.operation, Value):
            operands = self.operation.tensor.held_bytes
        return operands + sum(source.held_bytes for source in self.sources)

    def open(self, device: str = "cpu") -> RowReader:
        """Reads rows of the inputs, applies the operation, rounds.

        Raises:
            PluginError: from the reader; the operation gives another shape than its edit promised.
        """
        function = self.operation.prepare(device)
        readers = [source.open(device) for source in self.sources]
        if self.row_local:
            return lambda start, stop: self._rounded(
                function(start, stop, *(read(start, stop) for read in readers)), stop - start
            )

        def whole(start: int, stop: int) -> torch.Tensor:
            inputs = [read(0, source.spec.rows) for read, source in zip(readers, self.sources, strict=True)]
            return self._rounded(function(0, self.spec.rows, *inputs), self.spec.rows)[start:stop]

        return whole

    def _rounded(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        return check_rows(self.spec, values, rows).to(torch_dtype(self.spec.dtype))

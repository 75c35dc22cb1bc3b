"""`W += s·(L @ R)` on lazy tensors: the low-rank update that LoRA merges and per-image weights share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from regraft.core.operations import Operation, RowFunction
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRankDelta(Operation):
    """`out = round(W + s·(L @ R))`: factors, product and sum in fp32, one rounding to the dtype of the input.

    The bits of a row depend neither on which rows are computed with it nor on the number of threads. That rests on
    three things: chunks depend on the spec alone (`row_chunks`), the writer gives torch one thread, and BLAS sums a
    row in one order for any number of rows from two up (a single row is padded, see the kernel).

    Args:
        input: name of the weight [rows, cols], bf16, fp16, fp32 or fp64.
        left: [rows, rank], any float dtype.
        right: [rank, cols], any float dtype.
        scale: s.
        seed: rounds to bf16 and fp16 stochastically, by noise that depends on the seed, the row and the column alone;
            None rounds to nearest.
    """

    input: str
    left: LazyTensor
    right: LazyTensor
    scale: float = 1.0
    seed: int | None = None
    kind: ClassVar[str] = "low-rank-delta"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one input."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, LazyTensor]:
        """The two factors."""
        return {"left": self.left, "right": self.right}

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The scale; the seed, if there is one."""
        return {"scale": self.scale} | ({} if self.seed is None else {"seed": self.seed})

    def prepare(self, device: str) -> RowFunction:
        """Load the factors in fp32."""
        from regraft.kernels.lora_merge import lora_merge

        left, right = self.left.load(device).float(), self.right.load(device).float()
        if not (left.any() and right.any()):
            return lambda start, stop, rows: rows  # to the bit: a sum with zero would turn -0 into 0
        return lambda start, stop, rows: lora_merge(
            rows, left[start:stop], right, self.scale, seed=self.seed, first_row=start
        )

    @classmethod
    def restore(
        cls, inputs: tuple[str, ...], parameters: Mapping[str, Any], operands: Mapping[str, LazyTensor]
    ) -> LowRankDelta:
        """From a saved patch."""
        seed = parameters.get("seed")
        return cls(inputs[0], operands["left"], operands["right"], float(parameters["scale"]), seed)


class Transposed(LazyTensor):
    """A matrix [m, n] seen as [n, m]; read whole, so for factors and other small tensors."""

    def __init__(self, tensor: LazyTensor) -> None:
        rows, cols = tensor.spec.shape
        self.spec = TensorSpec(tensor.spec.name, tensor.spec.dtype, (cols, rows))
        self.tensor = tensor

    @property
    def row_local(self) -> bool:
        """A row of it needs every row of the matrix."""
        return False

    @property
    def held_bytes(self) -> int:
        """The matrix, before and after it is turned."""
        return self.tensor.held_bytes + 2 * self.spec.nbytes

    def open(self, device: str = "cpu") -> RowReader:
        """Slices of the turned matrix."""
        turned = self.tensor.load(device).T.contiguous()
        return lambda start, stop: turned[start:stop]


def realised(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, *, seed: int | None = None
) -> float:
    """How much of a low-rank delta rounding loses: `‖round(W + dW) - W - dW‖ / ‖dW‖` with dW = s·(L @ R).

    0 means that the weight takes the delta exactly, 1 that about nothing of it arrives: entries below half a unit in
    the last place of the weight vanish. Norms are over all entries, in float64.

    Args:
        weight: [rows, cols].
        left: [rows, rank].
        right: [rank, cols].
        scale: s.
        seed: as `LowRankDelta`.

    Returns:
        The ratio; 0.0 for a delta that is zero.
    """
    from regraft.kernels.lora_merge import BLOCK_ELEMENTS, lora_merge

    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    lost = wanted = 0.0
    for start in range(0, len(weight), step):
        rows, factor = weight[start : start + step], left[start : start + step]
        delta = (factor.double() @ right.double()) * scale
        merged = lora_merge(rows, factor, right, scale, seed=seed, first_row=start)
        error = merged.double() - rows.double() - delta
        lost += float(error.square().sum())
        wanted += float(delta.square().sum())
    return (lost / wanted) ** 0.5 if wanted else 0.0

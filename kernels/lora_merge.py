"""W + s·(L @ R): low-rank updates of weights, one or many at a time, accumulated in fp32 and rounded once.

    P[i, j] = fma(L[i, K-1], R[K-1, j], ... fma(L[i, 1], R[1, j], fma(L[i, 0], R[0, j], 0)))     in fp32, in this order
    S = W + round(s·P)                                                                            in fp32
    out = S rounded once to the dtype of W: to nearest, ties to even, or stochastically

`reference` is the specification. The Triton kernel has its bits, on CUDA and in the interpreter. So has the torch path,
as far as its BLAS adds in order with fused multiply-adds: MKL does (measured on AVX-512 up to rank 300), and a test
compares. float64 weights are computed in float64, in the order of BLAS.

The kernel stands in `lora_merge_triton`, apart from this file because importing triton costs 70 MB and 0.13 s that a
machine without CUDA has no use for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from regraft.kernels.stochastic import round_stochastically

Implementation = Literal["auto", "torch", "triton"]

BLOCK_ELEMENTS = 1 << 17
"""Elements computed at a time on the CPU: the product and the wide weight, 512 KB each, stay in the second-level cache
(measured: 0.42 ms for 512 K bf16 elements at rank 16, against 0.53 ms in one piece)."""

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Merge:
    """One matrix of a group. Shapes: R rows, C columns, K rank.

    Args:
        weight: [R, C], bf16, fp16, fp32 or fp64; left as it is.
        left: [R, K], any float dtype.
        right: [K, C], any float dtype.
        scale: s.
        seed: 0 to 2^64 - 1 rounds stochastically; None, and weights wider than 16 bits, to nearest.
        first_row: number of the first row in the whole matrix: the noise of an element depends on the seed and on its
            place there, not on what is computed together.
    """

    weight: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    scale: float
    seed: int | None = None
    first_row: int = 0

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: they do not fit.
        """
        shapes = [tuple(tensor.shape) for tensor in (self.weight, self.left, self.right)]
        flat = all(len(shape) == 2 for shape in shapes)
        (left, right) = (self.left.shape, self.right.shape)
        if not flat or left[1] != right[0] or tuple(self.weight.shape) != (left[0], right[1]):
            raise ValueError(f"shapes of weight, left and right do not fit [R, C], [R, K], [K, C]: {shapes}")


def reference(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    seed: int | None = None,
    first_row: int = 0,
) -> torch.Tensor:
    """The specification of `lora_merge`, for any float dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = left.to(wide), right.to(wide)
    product = left @ right if wide == torch.float64 else _chain(left, right)
    summed = weight.to(wide) + product * scale
    return summed.to(weight.dtype) if seed is None else round_stochastically(summed, weight.dtype, seed, first_row)


def _chain(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product in fp32, each element a chain of fused multiply-adds along the rank.

    A product of two fp32 numbers is exact in fp64; the sum is rounded to odd there, after which rounding to fp32 gives
    what one rounding would have given (Boldo and Melquiond, 2008).
    """
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    for column, row in zip(left.double().unbind(1), right.double().unbind(0), strict=True):
        product, addend = column[:, None] * row, total.double()
        summed = product + addend
        part = summed - product
        error = (product - (summed - part)) + (addend - part)
        bits = summed.view(torch.int64)
        away = torch.where((error > 0) == (summed > 0), 1, -1)
        total = torch.where((error != 0) & (bits % 2 == 0), bits + away, bits).view(torch.float64).float()
    return total


def lora_merge(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    *,
    seed: int | None = None,
    first_row: int = 0,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """W + s·(L @ R) in the dtype of W, as a new tensor: a group of one. Arguments as `Merge` and `lora_merge_group`.

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: `triton` is asked for where it cannot run.
    """
    merge = Merge(weight, left, right, scale, seed, first_row)
    return lora_merge_group([merge], implementation=implementation)[0]


def lora_merge_group(merges: Sequence[Merge], *, implementation: Implementation = "auto") -> list[torch.Tensor]:
    """The merged weights of a group, as new tensors; on CUDA in one launch for each dtype and kind of rounding.

    Args:
        merges: what to compute; shapes, ranks and dtypes may differ.
        implementation: `auto` takes Triton for CUDA tensors that its kernel supports and torch elsewhere.

    Raises:
        RuntimeError: `triton` is asked for where it cannot run.
    """
    chosen = [_chosen(implementation, merge.weight) for merge in merges]
    grouped = [merge for merge, how in zip(merges, chosen, strict=True) if how == "triton"]
    launched = iter(_launch(grouped) if grouped else ())
    return [next(launched) if how == "triton" else _torch(merge) for merge, how in zip(merges, chosen, strict=True)]


def _launch(merges: Sequence[Merge]) -> list[torch.Tensor]:
    from regraft.kernels.lora_merge_triton import launch

    return launch(merges)


def _torch(merge: Merge) -> torch.Tensor:
    if not merge.weight.is_cuda:
        return _blocked(merge)
    return reference(merge.weight, merge.left, merge.right, merge.scale, merge.seed, merge.first_row)


def _chosen(implementation: Implementation, weight: torch.Tensor) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    fault = (
        f"its kernel does not take {weight.dtype}"
        if weight.dtype not in _TRITON_DTYPES
        else ""
        if weight.is_cuda or interpreted
        else f"the tensors are on {weight.device}, not on a CUDA device"
    )
    if implementation == "triton" and fault:
        raise RuntimeError(f"the Triton implementation of lora_merge cannot run: {fault}")
    if implementation == "auto":
        return "torch" if fault or not weight.is_cuda else "triton"
    return implementation


def _blocked(merge: Merge) -> torch.Tensor:
    """As `reference` in blocks of rows that stay in the cache, with two passes less."""
    weight, scale = merge.weight, merge.scale
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = merge.left.to(wide), merge.right.to(wide)
    rows, cols = weight.shape
    step = min(rows, max(2, BLOCK_ELEMENTS // max(1, cols)))
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    product, sums = (torch.empty(step, cols, dtype=wide) for _ in range(2))
    fused = scale >= 1.0 and math.frexp(scale)[0] == 0.5
    for start in range(0, rows, step):
        block = slice(start, start + step)
        part = weight[block]
        total = _matmul(left[block], right, product[: len(part)])
        if not fused:
            total.mul_(scale)
        alpha = scale if fused else 1.0  # a power of two rounds nothing, so it may go into the sum
        if weight.dtype == wide:
            torch.add(part, total, alpha=alpha, out=out[block])
        else:
            summed = sums[: len(part)].copy_(part).add_(total, alpha=alpha)
            if merge.seed is not None:
                summed = round_stochastically(summed, weight.dtype, merge.seed, merge.first_row + start)
            out[block] = summed
    return out


def _matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`left @ right`, with the same bits for a row whatever rows stand beside it.

    BLAS multiplies a single row by other code, which sums in another order; so a single row is given a companion.
    From two rows on the bits of a row were the same for every number of rows tried, up to rank 256 (MKL, AVX-512).
    """
    if len(left) == 1:
        return out.copy_((left.expand(2, -1).contiguous() @ right)[:1])
    return torch.mm(left, right, out=out)

"""W + s·(L @ R): a low-rank update of a weight, accumulated in fp32 and rounded once.

    P = L @ R                       products and sums in fp32
    out = round(W + round(s·P))     both in fp32, then once to the dtype of W, to nearest, ties to even

`reference` is the specification. The Triton kernel stands in `low_rank_update_triton`, apart from this file because
importing triton costs 70 MB and 0.13 s that a machine without CUDA has no use for.
"""

from __future__ import annotations

import math
import os
from typing import Literal

import torch

Implementation = Literal["auto", "torch", "triton"]

BLOCK_ELEMENTS = 1 << 17
"""Elements computed at a time on the CPU: the product and the wide weight, 512 KB each, stay in the second-level cache
(measured: 0.42 ms for 512 K bf16 elements at rank 16, against 0.53 ms in one piece)."""

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reference(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """The specification of `low_rank_update`, for any float dtype; float64 weights are computed in float64."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = (left.to(wide) @ right.to(wide)) * scale
    return (weight.to(wide) + product).to(weight.dtype)


def low_rank_update(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    *,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """W + s·(L @ R) in the dtype of W, as a new tensor.

    Shapes: R rows, C columns, K rank.

    Args:
        weight: [R, C], bf16, fp16, fp32 or fp64; left as it is.
        left: [R, K], any float dtype.
        right: [K, C], any float dtype.
        scale: s.
        implementation: `auto` takes Triton for CUDA tensors that its kernel supports and torch elsewhere.

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: `triton` is asked for where it cannot run.
    """
    _check_shapes(weight, left, right)
    if _chosen(implementation, weight) == "triton":
        from regraft.kernels.low_rank_update_triton import launch

        return launch(weight, left, right, scale)
    if weight.is_cuda:
        return reference(weight, left, right, scale)
    return _blocked(weight, left, right, scale)


def _check_shapes(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (weight, left, right)]
    flat = all(len(shape) == 2 for shape in shapes)
    if not flat or left.shape[1] != right.shape[0] or weight.shape != (left.shape[0], right.shape[1]):
        raise ValueError(f"shapes of weight, left and right do not fit [R, C], [R, K], [K, C]: {shapes}")


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
        raise RuntimeError(f"the Triton implementation of low_rank_update cannot run: {fault}")
    if implementation == "auto":
        return "torch" if fault or not weight.is_cuda else "triton"
    return implementation


def _blocked(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """As `reference`, to the bit, in blocks of rows and with two passes less."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = left.to(wide), right.to(wide)
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
            out[block] = sums[: len(part)].copy_(part).add_(total, alpha=alpha)
    return out


def _matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`left @ right`, with the same bits for a row whatever rows stand beside it.

    BLAS multiplies a single row by other code, which sums in another order; so a single row is given a companion.
    From two rows on the bits of a row were the same for every number of rows tried, up to rank 256 (MKL, AVX-512).
    """
    if len(left) == 1:
        return out.copy_((left.expand(2, -1).contiguous() @ right)[:1])
    return torch.mm(left, right, out=out)

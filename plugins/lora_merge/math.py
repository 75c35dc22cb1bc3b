"""The arithmetic of a LoRA merge, on plain numbers and tensors. Shapes: R rows, C columns, K rank.

LoRA: W' = W + s·L R, s = alpha / K (arXiv 2106.09685), or alpha / sqrt(K) for rank-stabilised LoRA (arXiv 2312.03732).
DoRA: W' = m · (W + s·L R) / ‖W + s·L R‖, with one norm for every output (arXiv 2402.09353, eq. 5).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def effective_scale(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """s: alpha over the rank, or over its square root."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def wide_sum(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s·(L @ R), not rounded: in fp32, or in float64 for a float64 weight.

    Args:
        weight: [R, C].
        left: [R, K].
        right: [K, C].
        scale: s.
    """
    import torch

    from regraft.kernels.lora_merge import lora_merge

    return lora_merge(weight.to(torch.promote_types(weight.dtype, torch.float32)), left, right, scale)


def with_magnitude(total: torch.Tensor, magnitude: torch.Tensor, *, by_column: bool) -> torch.Tensor:
    """Give every output vector of `total` the length that DoRA learnt for it; works in place.

    Args:
        total: W + s·L R [R, C], fp32.
        magnitude: [R], or [C] if `by_column`.
        by_column: the outputs are the columns: Conv1D, stored as (in, out), and embeddings.
    """
    import torch

    norm = torch.linalg.vector_norm(total, dim=0 if by_column else 1)
    factor = magnitude.to(total.dtype) / norm
    return total.mul_(factor if by_column else factor[:, None])

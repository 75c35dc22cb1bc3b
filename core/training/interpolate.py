"""Weights between those before a training and those after it: how strongly a step shows.

`W = W_before + λ·(W_after - W_before)`, tensor by tensor, after the training. Interpolating while it trains, as I-LoRA
does with its two memories (arXiv 2402.18865), is a moving average: `TrainSettings.ema`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def interpolate(before: torch.Tensor, after: torch.Tensor, strength: float) -> torch.Tensor:
    """`before + strength·(after - before)`, computed in fp32 (float64 if either is float64) and rounded once.

    At 0 the result has the bytes of `before`; at 1 those of `after`, rounded. An entry in which both are equal keeps
    the bytes that it has in `before` at every strength below 1, so that what was not trained does not change.

    Args:
        before: the weights as they are stored, any shape; the result has their dtype and device.
        after: the trained weights, of the same shape, in any float dtype.
        strength: λ; beyond 1 it goes further the same way.

    Returns:
        A tensor that shares no memory with either.
    """
    import torch

    after = after.detach().to(before.device)
    if strength == 1:
        return after.to(before.dtype, copy=True).contiguous()
    result = before.detach().clone(memory_format=torch.contiguous_format)
    if strength == 0:
        return result
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    start, end = result.to(wide), after.to(wide)
    mixed = (start + strength * (end - start)).to(before.dtype)
    return torch.where(start == end, result, mixed)  # -0.0 + 0.0 is 0.0, and Inf - Inf is NaN

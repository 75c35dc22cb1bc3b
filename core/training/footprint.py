"""How much memory and disk a training takes, from headers alone: bounds for the plan, not a promise to the byte."""

from __future__ import annotations

from math import prod

from regraft.core.checkpoint import Checkpoint

_FP32 = 4
_MOMENTS = 2 * _FP32
_STATES = 2
"""Saved states that stand beside each other for a moment."""
_ACTIVATIONS = 34
"""Numbers that a decoder layer keeps for the backward pass, for each token and hidden unit (arXiv 2205.05198, §4.1, in
16-bit bytes; attention scores come on top only without fused attention)."""


def model_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's model in fp32, with the copy that loading makes for a moment of its largest tensor."""
    sizes = [prod(spec.shape) * _FP32 for spec in checkpoint.specs.values()]
    return sum(sizes) + max(sizes, default=0)


def training_bytes(checkpoint: Checkpoint, trained: int | None = None, *, tokens: int, ema: bool = False) -> int:
    """Bytes of model, gradients, optimiser and activations.

    Args:
        checkpoint: that is trained.
        trained: numbers that learn; None for all.
        tokens: that are computed at once: micro-batch times length.
        ema: whether an average is kept.
    """
    numbers = sum(prod(spec.shape) for spec in checkpoint.specs.values()) if trained is None else trained
    config = checkpoint.text_config
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    activations = _ACTIVATIONS * hidden * layers * tokens * _FP32 // 2
    return model_bytes(checkpoint) + shared_bytes(numbers, ema=ema) + activations


def shared_bytes(numbers: int, *, ema: bool = False) -> int:
    """Bytes of gradients, moments and average of `numbers` that learn. Of whole parameters each process of a training
    has its part (see `sharding`); the weights are whole in each when it loads them, and when they are gathered.
    """
    return numbers * (_FP32 + _MOMENTS + (_FP32 if ema else 0))


def state_bytes(numbers: int, *, ema: bool = False) -> int:
    """Bytes on the disk of the saved states of `numbers` that learn: weights, both moments and an average, in fp32."""
    return _STATES * numbers * (_FP32 + _MOMENTS + (_FP32 if ema else 0))

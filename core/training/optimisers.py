"""The optimiser that the settings name, over the tensors that learn."""

from __future__ import annotations

from typing import Any

import torch

from regraft.core.errors import Unsupported
from regraft.core.training.settings import TrainSettings
from regraft.core.training.spam import Spam
from regraft.core.training.weights import Weights

_LEAST_RATE_FOR_BF16 = 1e-5
"""Below, an update of one rate is lost on nearly all weights: at 1e-6 it changes 2% of N(0, 0.02²), at 1e-5 16%."""


def make_optimizer(settings: TrainSettings, weights: Weights) -> torch.optim.Optimizer:
    """The optimiser; matrices decay, vectors do not.

    Raises:
        Unsupported: weights in bfloat16 without a master copy would not move, or bitsandbytes is missing.
    """
    _refuse_rounding_away(settings, weights)
    leaves = list(weights.leaves.values())
    matrices, vectors = [one for one in leaves if one.dim() > 1], [one for one in leaves if one.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if params
    ]
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas}
    if settings.optimizer == "spam":
        return Spam(groups, eps=settings.eps or 1e-6, **options, **settings.spam.model_dump())
    options["eps"] = settings.eps or 1e-8
    if settings.optimizer == "adamw-8bit":
        return _eight_bit(groups, options)
    fused = all(one.device.type in ("cpu", "cuda") for one in leaves)
    return torch.optim.AdamW(groups, fused=fused, **options)


def _eight_bit(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise Unsupported(
            "adamw-8bit needs bitsandbytes", where="optimizer", found=error, remedy="install it, or use adamw"
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return optimizer


def _refuse_rounding_away(settings: TrainSettings, weights: Weights) -> None:
    small = next((name for name, leaf in weights.leaves.items() if leaf.dtype != torch.float32), None)
    if small is not None and 0 < settings.lr < _LEAST_RATE_FOR_BF16:
        raise Unsupported(
            "weights in less than fp32 do not move at this rate: nearly every update is rounded away",
            where=small,
            expected=f"lr of {_LEAST_RATE_FOR_BF16} or more, or fp32 master weights",
            found=f"lr {settings.lr}, weights in {weights.leaves[small].dtype}",
            remedy="set master_weights = true, or load the model in float32",
        )

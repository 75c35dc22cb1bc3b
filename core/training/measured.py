"""The loss of data that is not learnt from."""

from __future__ import annotations

import torch

from regraft.core.training.model import memory
from regraft.core.training.modes import computing, reproducible
from regraft.core.training.objectives import Objective
from regraft.core.training.steps import Steps


@torch.no_grad()
def held_out_sums(objective: Objective, steps: Steps, device: str, precision: str) -> tuple[dict[str, float], int]:
    """Sums over an epoch of `steps`: `loss`, the objective's other figures, and beside them the units.

    Args:
        objective: of the model as it stands.
        steps: the data.
        device: of the model.
        precision: in which it is computed.

    Raises:
        ResourceError: memory is short.
    """
    kind, sums, units = torch.device(device), {"loss": 0.0}, 0
    with reproducible(kind), memory("measuring the held-out loss"):
        for step in range(steps.per_epoch):
            units += steps.units(step)
            for piece in steps.micro(step, device):
                with computing(kind.type, precision):
                    loss, figures = objective(piece)
                for name, value in {"loss": loss, **figures}.items():
                    sums[name] = sums.get(name, 0.0) + value.item()
    return sums, units

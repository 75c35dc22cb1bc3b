"""What is minimised: cross-entropy of labels, or the preference of one answer to another (DPO)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from regraft.core.data.batches import Batch, Batches
from regraft.core.training.head import Head
from regraft.core.training.modes import computing, without_dropout
from regraft.core.training.tensor_file import read_tensors, write_tensors


class Objective(Protocol):
    """The loss of a batch.

    A step's loss is the sum of its batches' losses divided by the step's units, which the batches count: so the result
    does not depend on how a step is cut into pieces.
    """

    def __call__(self, batch: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The summed loss, a scalar, and other figures for the log, summed likewise."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What decides the loss, to tell whether a saved state belongs to it; JSON values."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the labels of a batch, in nats; the unit is a learnt token."""

    head: Head

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The sum over learnt tokens."""
        return self.head.label_losses(batch), {}

    def identity(self) -> Mapping[str, Any]:
        """Its name."""
        return {"name": "cross-entropy"}


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation (arXiv 2305.18290, equation 7); the unit is a pair.

        loss = -log σ(β·[(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)])

    Args:
        head: of the model that learns.
        reference: [N, 2] log-probabilities of chosen and rejected answers under the reference, by example number.
        beta: how far the model may go from the reference.
    """

    head: Head
    reference: torch.Tensor
    beta: float = 0.5

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The sum over pairs, with how many pairs are ranked right and by what margin."""
        chosen, rejected = answer_log_probs(self.head, batch)
        reference = self.reference[list(batch.indices)].to(chosen.device)
        margin = self.beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
        figures = {"accuracy": (margin > 0).sum(), "margin": margin.detach().sum()}
        return -F.logsigmoid(margin).sum(), figures

    def identity(self) -> Mapping[str, Any]:
        """Name and β; the reference follows from the start weights."""
        return {"name": "dpo", "beta": self.beta}


def answer_log_probs(head: Head, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [B / 2] of the chosen and of the rejected answers of a batch of pairs."""
    total = -head.label_losses(batch, reduction="none").sum(1)
    half = len(batch.indices)
    return total[:half], total[half:]


@dataclass(frozen=True)
class ReferencePass:
    """One frozen pass over all pairs.

    Args:
        head: of the reference: the model before it learns.
        batches: whose examples are passed, `micro_batch` pairs at a time.
        precision: as the training will compute, so that the loss begins at ln 2.
        cache: a file that keeps the result; a file for other pairs or another `identity` is replaced, by rank 0.
        identity: what the reference is made from, such as the checkpoint's digest.
    """

    head: Head
    batches: Batches
    precision: str = "float32"
    cache: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)

    def log_probs(self) -> torch.Tensor:
        """[N, 2] log-probabilities, fp32, on the CPU: chosen, rejected.

        Raises:
            InputError: the cache is damaged.
        """
        made_from = {"identity": dict(self.identity), "data": self.batches.identity()["data"],
                     "precision": self.precision}  # fmt: skip
        if self.cache is not None and self.cache.is_file():
            tensors, metadata = read_tensors(self.cache)
            if metadata.get("made_from") == json.dumps(made_from, sort_keys=True):
                return tensors["log_probs"]
        values = self._computed()
        if self.cache is not None and self.batches.rank == 0:
            write_tensors(self.cache, {"log_probs": values}, {"made_from": json.dumps(made_from, sort_keys=True)})
        return values

    def _computed(self) -> torch.Tensor:
        count, model = len(self.batches.examples), self.head.model
        size = self.batches.settings.micro_batch or self.batches.settings.batch_size
        device = next(model.parameters()).device
        values = torch.empty(count, 2)
        with torch.no_grad(), without_dropout(model), computing(device.type, self.precision):
            for start in range(0, count, size):
                batch = self.batches.gather(range(start, min(start + size, count)), str(device))
                values[start : start + size] = torch.stack(answer_log_probs(self.head, batch), dim=1).float().cpu()
        return values

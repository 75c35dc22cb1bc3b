"""The training loop: steps in, weights changed in place, a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from regraft.core.errors import UsageError
from regraft.core.processes import torch_shares_out
from regraft.core.training.distributed import connected, join
from regraft.core.training.model import memory, switch_gradient_checkpointing
from regraft.core.training.modes import reproducible, resolve_precision, without_dropout
from regraft.core.training.objectives import Objective
from regraft.core.training.records import Records, Report
from regraft.core.training.session import PLACES, Session
from regraft.core.training.settings import TrainSettings
from regraft.core.training.sharding import sharable, shared_out
from regraft.core.training.state import differences
from regraft.core.training.steps import Piece, Steps
from regraft.core.training.weights import Trainable, Weights, digest

__all__ = ["Piece", "Records", "Report", "Steps", "train"]


def train(
    model: Any,
    batches: Steps,
    settings: TrainSettings,
    objective: Objective,
    trainable: Mapping[str, Trainable],
    *,
    penalty: Callable[[], torch.Tensor] | None = None,
    records: Records | None = None,
) -> Report:
    """Minimise `objective` over `batches`; the weights are changed in place and end in eval mode, asking no gradient.

    A step's loss is the sum over its pieces divided by the step's units, plus the penalty: so two pieces of four are
    one of eight. The same seed, settings and device give the same bytes, interrupted or not.

    Under torchrun all processes call it with the same arguments, but for their pieces of the batches, and end with the
    same weights. What learns whole is shared out among them (FSDP2), unless there is a penalty, which may read it; of
    the rest each has a copy. The first one writes.

    Args:
        model: the module that the objective runs.
        batches: the steps.
        settings: rates, optimiser, precision.
        objective: the loss of a piece.
        trainable: what learns, by name; everything else is frozen.
        penalty: added to the loss of every step, such as λ·Σ|A|.
        records: saved state, logs, listener.

    Raises:
        TransformationError: the loss or its gradient is not finite; names the rows, and the last good state is kept.
        UsageError: nothing learns; the saved state belongs to another training; a log needs what is not installed; the
            batches, or what is trained, are not those of the other processes.
        Unsupported: the precision or the optimiser is none for this device or these weights.
        ResourceError: out of memory, a record cannot be written, or another process has ended.
        InputError: the saved state is damaged.
    """
    if not trainable:
        raise UsageError("nothing is to learn", where="trainable", expected="at least one parameter")
    device = next(iter(trainable.values())).parameter.device
    precision = resolve_precision(settings.precision, str(device))
    records, masters = records or Records(), settings.master_weights
    with ExitStack() as stack:
        stack.enter_context(connected(batches.world))
        stack.enter_context(reproducible(device))
        stack.enter_context(_learning(model, settings))
        stack.enter_context(memory("training"))
        group = join(batches.rank, batches.world, device)
        identity = None
        if records.state is not None or group.world > 1:
            identity = _identity(batches, settings, objective, trainable, records, precision, device)
            _check_agreement(group.gather(identity))
        sharing = group.world > 1 and penalty is None and torch_shares_out()
        chosen = sharable(model, trainable, group.world) if sharing else {}
        shards = stack.enter_context(shared_out(model, objective, chosen, device, precision=precision, masters=masters))
        weights = Weights(trainable, masters=masters, shards=shards.parameters)
        stack.callback(weights.clear)
        session = Session(batches, settings, shards.compute, weights, penalty, records, precision, device, group,
                           identity)  # fmt: skip
        stack.callback(session.close)
        return session.run()


def _identity(
    batches: Steps,
    settings: TrainSettings,
    objective: Objective,
    trainable: Mapping[str, Trainable],
    records: Records,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the result; JSON values."""
    return {
        "settings": settings.identity(),
        "batches": dict(batches.identity()),
        "objective": dict(objective.identity()),
        "trainable": {name: one.identity() for name, one in trainable.items()},
        "start": digest(trainable, masters=settings.master_weights),
        "precision": precision,
        "computed": {"device": device.type, "torch_threads": torch.get_num_threads() if device.type == "cpu" else None},
        "recipe": dict(records.identity),
    }


def _check_agreement(identities: Sequence[Mapping[str, Any]]) -> None:
    for rank, identity in enumerate(identities):
        if lines := differences(identities[0], identity):
            raise UsageError(
                "the processes do not train the same",
                where=f"process {rank}",
                expected="what process 0 trains",
                found="; ".join(lines[:PLACES]),
                remedy="give all of them the same files, versions and kind of device",
            )


@contextmanager
def _learning(model: Any, settings: TrainSettings) -> Iterator[None]:
    """Only what is trainable asks for gradients; dropout as the settings say; afterwards eval mode."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with ExitStack() as stack:
        if not settings.dropout:
            stack.enter_context(without_dropout(model))
        if settings.gradient_checkpointing:
            switch_gradient_checkpointing(model)
        model.train()
        try:
            yield
        finally:
            model.eval()

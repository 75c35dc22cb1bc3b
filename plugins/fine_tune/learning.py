"""From tensors of the checkpoint to parameters of the model that learn, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.patch import Patch
from regraft.core.training.trained import stored_tensors, trained_patch
from regraft.core.training.weights import Trainable, select
from regraft.core.training.whole import completed, learnable
from regraft.plugins.fine_tune.target import Target


def learning(checkpoint: Checkpoint, target: Target, model: Any) -> dict[str, Trainable]:
    """What learns, by its name in `model`. What could not be stored afterwards is refused now.

    Args:
        checkpoint: what the model was made from.
        target: the tensors.
        model: from `materialise_model`.

    Raises:
        Unsupported: a tensor is no parameter of the model, or one with others that are not selected.
    """
    if target.slices:
        return _sliced(checkpoint, target, model)
    if target.specs.keys() == learnable(checkpoint).keys():
        learns = select(model)
        for name in learns:
            stored_tensors(checkpoint, model, name)
        return learns
    return select(model, _parameters(checkpoint, target, model))


def stored(
    checkpoint: Checkpoint, target: Target, model: Any, learns: Mapping[str, Trainable], *, strength: float
) -> Patch:
    """The patch with what `model` has learnt: an edit for every tensor of `target`, and no other.

    Args:
        checkpoint: what the model was made from.
        target: the tensors.
        model: trained.
        learns: from `learning`.
        strength: how much of the change is stored; see `interpolate`.
    """
    patch = completed(checkpoint, trained_patch(checkpoint, model, learns, strength=strength), model)
    return replace(patch, edits={name: patch.edits[name] for name in target.specs})


def _sliced(checkpoint: Checkpoint, target: Target, model: Any) -> dict[str, Trainable]:
    parameters = dict(model.named_parameters())
    learns = {}
    for name, one in target.slices.items():
        parameter = parameters.get(one.parameter)
        if parameter is None or list(stored_tensors(checkpoint, model, one.parameter)) != [name]:
            raise Unsupported(
                "the model's class holds this tensor otherwise than the checkpoint",
                where=f"{checkpoint.label}: {name}",
                expected=f"parameter {one.parameter}",
                found=type(model).__name__,
                remedy='train whole tensors: select = "names"',
            )
        learns[one.parameter] = Trainable(parameter, one.indices, one.axis)
    return learns


def _parameters(checkpoint: Checkpoint, target: Target, model: Any) -> list[str]:
    """The parameters that hold the tensors of `target`."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    wanted, found, covered = set(target.specs), list[str](), set[str]()
    for name, _ in model.named_parameters():
        tensors = _stored(checkpoint, model, name)
        inside = tensors & wanted
        if missing := sorted(tensors - wanted):
            if inside:
                raise Unsupported(
                    "the model's class holds these tensors as one parameter, so they learn together or not at all",
                    where=name,
                    expected=f"all {len(tensors)} of them",
                    found=f"{len(inside)}, without {missing[0]}",
                    remedy="select all of them, or none",
                )
            continue
        if inside:
            found.append(name)
            covered |= inside
    for name in sorted(wanted - covered):
        if tied.get(name) not in covered:
            raise Unsupported(
                "this tensor is no parameter of the model that could learn by itself",
                where=f"{checkpoint.label}: {name}",
                found=f"tied to {tied[name]}" if name in tied else "a stored buffer, or part of another model",
                remedy="select what it is tied to as well" if name in tied else "leave it out of `names`",
            )
    return found


def _stored(checkpoint: Checkpoint, model: Any, name: str) -> set[str]:
    try:
        return set(stored_tensors(checkpoint, model, name))
    except Unsupported:
        return set()

"""From a trained model back to the checkpoint: parameters under the names, shapes and dtypes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.operations import Value
from regraft.core.patch import Edit, Patch
from regraft.core.specs import FLOAT_CODES
from regraft.core.tensors import LazyTensor, MemoryTensor

if TYPE_CHECKING:
    import torch


def trained_patch(before: Checkpoint, model: Any, names: Iterable[str], *, strength: float = 1.0) -> Patch:
    """The patch that stores what `model` has learnt.

    It has an edit for every tensor behind `names`, so that it keeps an outline's promise. One whose bytes are still
    those of the checkpoint refers to the stored tensor and is copied, not rewritten; every other tensor is left alone.

    Args:
        before: what the model was made from.
        model: from `materialise_model`, trained.
        names: parameters that were trained, as the model names them.
        strength: how much of the change is stored; see `interpolate`.

    Raises:
        Unsupported: a parameter is no tensor of the checkpoint, or not of floating point.
    """
    from regraft.core.training.interpolate import interpolate

    edits, changed = {}, 0
    for name in names:
        for stored, tensor in stored_tensors(before, model, name).items():
            spec, old = before.specs[stored], before.load(stored)
            rounded = interpolate(old, tensor, strength)
            source: LazyTensor = MemoryTensor(stored, rounded)
            if _same(old, rounded):
                source = before.tensor(stored)
            else:
                changed += 1
            edits[stored] = Edit(spec, Value(source))
    return Patch(edits=edits, metrics={"trained_tensors": len(edits), "changed_tensors": changed})


def stored_tensors(before: Checkpoint, model: Any, name: str) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors that parameter `name` of `model` holds: several where the class fuses what is stored
    apart, such as experts. Raises as `trained_patch`.
    """
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if parameter is None or not parameter.is_floating_point():
        raise Unsupported(
            "cannot be trained",
            where=name,
            expected="a floating-point parameter of the model",
            found="no such parameter" if parameter is None else parameter.dtype,
            remedy="train weights that are not quantised",
        )
    candidates = [_reverted(model, one, parameter) for one in (name, *_twins(model, name))]
    candidates += [{one: parameter} for one in (name, *_twins(model, name))]
    for tensors in candidates:
        if tensors and all(_fits(before, stored, tensor) for stored, tensor in tensors.items()):
            return tensors
    raise Unsupported(
        "no tensor of the checkpoint is this parameter",
        where=name,
        found=f"shape {list(parameter.shape)}",
        remedy="train parameters that the checkpoint stores",
    )


def _reverted(model: Any, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would write for this parameter; transformers keeps how it renamed and fused on loading."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, {name: parameter.detach()})
    except (KeyError, ValueError, RuntimeError, IndexError):
        return {}  # a conversion that needs more than this parameter
    return tensors


def _twins(model: Any, name: str) -> list[str]:
    """Names that are tied to this one."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(name, name)
    return [one for one in (source, *(key for key, value in tied.items() if value == source)) if one != name]


def _fits(before: Checkpoint, stored: str, tensor: torch.Tensor) -> bool:
    spec = before.specs.get(stored)
    return spec is not None and spec.shape == tuple(tensor.shape) and spec.dtype in FLOAT_CODES


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the bytes are equal: 0.0 is not -0.0, and NaN is itself."""
    import torch

    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))

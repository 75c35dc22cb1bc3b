"""Training all weights of a checkpoint: which tensors that are, and a patch that has every one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.operations import Value
from regraft.core.patch import Edit, Patch
from regraft.core.specs import FLOAT_CODES, TensorSpec


def learnable(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """The tensors that a full training rewrites, by name: all of floating point, for the outline of a plan."""
    return {name: spec for name, spec in checkpoint.specs.items() if spec.dtype in FLOAT_CODES}


def completed(checkpoint: Checkpoint, patch: Patch, model: Any) -> Patch:
    """`patch`, from `trained_patch`, with every tensor of `learnable`.

    What is no parameter of the model, such as a stored buffer, stays as it is. A head that is tied, and stored all the
    same, follows its embedding: with other bytes than that it would no longer be tied.

    Args:
        checkpoint: what the model was made from.
        patch: of the trained parameters.
        model: the trained model.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    edits = {}
    for name, spec in learnable(checkpoint).items():
        source = tied.get(name, name)
        if name in patch.edits:
            edits[name] = patch.edits[name]
        elif source in patch.edits:
            edits[name] = Edit(spec, patch.edits[source].operation)
        else:
            edits[name] = Edit(spec, Value(checkpoint.tensor(name)))
    return replace(patch, edits=edits)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse weights that are stored in fewer than 16 bits.

    Raises:
        Unsupported: they are.
    """
    small = next((spec for spec in checkpoint.specs.values() if spec.dtype.startswith("F8")), None)
    if small is not None or checkpoint.config.get("quantization_config"):
        raise Unsupported(
            "quantised weights cannot learn",
            where=f"{checkpoint.label}: {small.name if small else f'{CONFIG}: quantization_config'}",
            expected="weights of floating point, of 16 bits or more",
            found=small.dtype if small else "quantised weights",
            remedy="use the model's unquantised checkpoint, or one that regraft dequantises (bitsandbytes, GGUF)",
        )

"""The weights of the body that learn beside the new rows: which they are, from headers alone."""

from __future__ import annotations

from regraft.core.architectures import Slot, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.operations import Value
from regraft.core.patch import Edit
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.plugins.tokenizer_retrofit.params import BodySettings


def body_slots(checkpoint: Checkpoint, settings: BodySettings) -> dict[str, Slot]:
    """The weights that get factors, by name, in the order of layers.

    Raises:
        Unsupported: no layer has such a projection as a module of its own, such as in a mixture of experts; a weight
            is not floating-point.
    """
    wanted = set(settings.targets)
    modules = {name: slot for name, slot in architecture_of(checkpoint.config, checkpoint.specs).modules.items()
               if name in checkpoint.specs}  # fmt: skip
    found = {name: slot for name, slot in modules.items() if wanted & {*slot.role.split("+")}}
    if missing := wanted - {role for slot in found.values() for role in slot.role.split("+")}:
        known = dict.fromkeys(role for slot in modules.values() for role in slot.role.split("+"))
        raise Unsupported(
            "no layer has this projection as a module of its own", where="adapt.body.targets",
            expected=", ".join(role for role in known if role.endswith("_proj")), found=sorted(missing)[0],
            remedy="name others",
        )  # fmt: skip
    for name in found:
        if (spec := checkpoint.specs[name]).dtype not in FLOAT_CODES:
            raise Unsupported("a weight of the body is in a dtype that cannot be computed with", where=name,
                              expected=", ".join(sorted(FLOAT_CODES)), found=spec.dtype,
                              remedy="leave adapt.body out, or use an unquantised base")  # fmt: skip
    return found


def body_specs(checkpoint: Checkpoint, settings: BodySettings | None) -> dict[str, TensorSpec]:
    """The tensors that training of the body may rewrite; none without settings."""
    return {} if settings is None else {name: checkpoint.specs[name] for name in body_slots(checkpoint, settings)}


def body_numbers(checkpoint: Checkpoint, settings: BodySettings | None) -> int:
    """How many numbers the factors hold."""
    return 0 if settings is None else sum(settings.rank * sum(spec.shape)
                                          for spec in body_specs(checkpoint, settings).values())  # fmt: skip


def unchanged(checkpoint: Checkpoint, settings: BodySettings | None) -> dict[str, Edit]:
    """Edits that leave the body's weights as they are, where training came to nothing."""
    return {name: Edit(spec, Value(checkpoint.tensor(name))) for name, spec in body_specs(checkpoint, settings).items()}

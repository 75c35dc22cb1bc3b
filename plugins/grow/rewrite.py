"""From the growth of sizes to the patch. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import log2, sqrt
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported
from regraft.core.patch import Edit, Patch
from regraft.core.shape_operations import Constant, Resize
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.plugins.grow.config import config_change
from regraft.plugins.grow.params import GrowParams
from regraft.plugins.grow.sizes import Growth, growth_of
from regraft.plugins.grow.tensors import Tensors


def grow(checkpoint: Checkpoint, params: GrowParams) -> Patch:
    """The patch. Raises as `Grow.patch`."""
    growth = growth_of(checkpoint, params)
    tensors = Tensors(growth, params)
    _check_tensors(checkpoint, tensors)
    moves = _moved(checkpoint, tensors)
    patch = Patch(
        edits=moves.edits,
        removals=frozenset(moves.left) - set(moves.edits),
        renames=moves.renames,
        json={"config.json": config_change(checkpoint, growth)},
    )
    before = sum(spec.numel for spec in checkpoint.specs.values())
    after = before + _added(checkpoint, patch)
    metrics = {"parameters": after, "parameters_before": before, **_sizes(growth)}
    notes = (_summary(metrics), *_rounding(checkpoint, growth, tensors))
    return replace(patch, metrics=metrics, notes=notes)


@dataclass
class _Moves:
    """Edits and renames, and the old names of layers' tensors that neither keeps."""

    edits: dict[str, Edit] = field(default_factory=dict)
    renames: dict[str, str] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)


def _moved(checkpoint: Checkpoint, tensors: Tensors) -> _Moves:
    moves, growth = _Moves(), tensors.growth
    stem = _stem(growth)
    own: dict[int, list[str]] = {layer: [] for layer in range(growth.architecture.num_layers)}
    for name in checkpoint.specs:
        if (layer := _layer_of(name, stem)) in own:
            own[layer].append(name)
        elif edit := _edit(checkpoint, tensors, name, name):
            moves.edits[name] = edit
    for number, (source, new) in enumerate(growth.layers):
        for name in own[source]:
            target = f"{stem}{number}{name.removeprefix(f'{stem}{source}')}"
            if new:
                moves.edits.update(_new_edits(checkpoint, tensors, name, target))
            elif edit := _edit(checkpoint, tensors, name, target):
                moves.edits[target] = edit
                moves.left |= {name} - {target}
            elif target != name:
                moves.renames[target] = name
    return moves


def _edit(checkpoint: Checkpoint, tensors: Tensors, name: str, target: str) -> Edit | None:
    operation = tensors.resized(name) if name in tensors.stored else None
    if operation is None:
        return None
    spec = checkpoint.specs[name]
    return Edit(TensorSpec(target, spec.dtype, operation.shape(spec.shape)), operation)


def _new_edits(checkpoint: Checkpoint, tensors: Tensors, name: str, target: str) -> Iterator[tuple[str, Edit]]:
    """The copy of a tensor in a new layer: 0 where it writes to the residual stream; none of what the class ignores."""
    if name not in tensors.stored:
        return
    edit = _edit(checkpoint, tensors, name, target)
    spec = edit.spec if edit else replace(checkpoint.specs[name], name=target)
    if tensors.stored[name].silent:
        yield target, Edit(spec, Constant(spec.shape))
    else:
        yield target, edit or Edit(spec, Resize(name, {}))


def _stem(growth: Growth) -> str:
    """What stands before the number of a layer in names of tensors."""
    layout = growth.architecture.layout
    path = next(part.path for part in layout.family.parts if part.per_layer)
    return layout.prefix + path.partition("{layer}")[0]


def _layer_of(name: str, stem: str) -> int | None:
    number, dot, _ = name.removeprefix(stem).partition(".")
    return int(number) if name.startswith(stem) and dot and number.isdecimal() else None


def _check_tensors(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Refuse tensors that are not known, missing, of another size than config.json says, or no floating point."""
    architecture = tensors.growth.architecture
    for name in architecture.expected_specs():
        if name not in checkpoint.specs:
            raise InputError("a tensor of the model is missing", where=f"{checkpoint.label}: {name}",
                             remedy="check that every shard is there")  # fmt: skip
    for name, spec in checkpoint.specs.items():
        where = f"{checkpoint.label}: {name}"
        if name not in tensors.stored:
            if not architecture.ignores(name):
                raise Unsupported("a tensor is no part of the family that is known, so it is not known how it grows",
                                  where=where, found=spec, remedy="grow before the step that adds it")  # fmt: skip
            continue
        for axis, extent in tensors.old_extents(name).items():
            if axis >= len(spec.shape) or spec.shape[axis] != extent:
                raise InputError("config.json says another size", where=where, expected=f"{extent} along axis {axis}",
                                 found=spec, remedy="correct config.json")  # fmt: skip
        if spec.dtype not in FLOAT_CODES:
            raise Unsupported("a tensor is in a dtype that cannot be computed with", where=where,
                              expected=", ".join(sorted(FLOAT_CODES)), found=spec.dtype,
                              remedy="use an unquantised base")  # fmt: skip


def _added(checkpoint: Checkpoint, patch: Patch) -> int:
    """Parameters that the patch adds. A tensor that is moved by an edit counts once."""
    old = sum(checkpoint.specs[name].numel for name in {*patch.edits, *patch.removals} & set(checkpoint.specs))
    freed = sum(checkpoint.specs[name].numel for name in set(patch.renames.values()) & set(patch.edits))
    return sum(edit.spec.numel for edit in patch.edits.values()) - old + freed


def _sizes(growth: Growth) -> dict[str, Any]:
    """[old, new] by name."""
    old = growth.architecture
    sizes: dict[str, Any] = {}
    if growth.deeper:
        sizes["layers"] = [old.num_layers, len(growth.layers)]
    for name, pair in growth.sizes.items():
        if name == "q_size":
            sizes["heads"] = [old.num_heads, growth.num_heads]
        elif name == "kv_size":
            sizes["kv_heads"] = [old.num_kv_heads, growth.num_kv_heads]
        else:
            sizes[name] = list(pair)
    return sizes


def _summary(metrics: Mapping[str, Any]) -> str:
    pairs = {name: value for name, value in metrics.items() if isinstance(value, list)}
    words = ", ".join(f"{name} {old} to {new}" for name, (old, new) in pairs.items())
    return f"grown: {words}; {metrics['parameters_before']:,} to {metrics['parameters']:,} parameters"


def _rounding(checkpoint: Checkpoint, growth: Growth, tensors: Tensors) -> list[str]:
    """Whether the factor of a wider residual stream can be stored exactly."""
    if "hidden_size" not in growth.sizes:
        return []
    root = sqrt(growth.hidden_ratio)
    if log2(root).is_integer():
        return []
    dtypes = sorted({checkpoint.specs[name].dtype for name in tensors.stored if name in checkpoint.specs})
    factors = f"norm weights are multiplied by sqrt(d/D) = {root:.6g} and rounded to {', '.join(dtypes)}"
    return [f"{factors}; nothing is rounded at hidden_size = {4 * growth.sizes['hidden_size'][0]}"]

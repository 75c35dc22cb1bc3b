"""What learns, from headers and parameters alone: whole tensors, or the slices that belong to attention heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.head_file import Head, check_heads, read_heads_of
from regraft.core.host import host
from regraft.core.recipe.suggest import did_you_mean
from regraft.core.specs import TensorSpec
from regraft.core.training.whole import learnable
from regraft.plugins.fine_tune.params import FineTuneParams


@dataclass(frozen=True)
class Slice:
    """Rows or columns of a stored tensor, and where the stock class keeps it.

    Args:
        parameter: its name in the stock class.
        axis: of the stored tensor.
        indices: along it, in order.
    """

    parameter: str
    axis: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """The tensors that a step rewrites.

    Args:
        specs: by name.
        slices: of heads, by name of the tensor; empty where whole tensors learn.
        heads: layer and head.
    """

    specs: Mapping[str, TensorSpec]
    slices: Mapping[str, Slice] = field(default_factory=dict)
    heads: tuple[Head, ...] = ()

    @property
    def numbers(self) -> int:
        """How many learn."""
        if not self.slices:
            return sum(prod(spec.shape) for spec in self.specs.values())
        shapes = ((self.specs[name].shape, one) for name, one in self.slices.items())
        return sum(prod(shape) // shape[one.axis] * len(one.indices) for shape, one in shapes)


def target_of(checkpoint: Checkpoint, params: FineTuneParams) -> Target:
    """What `params` selects.

    Raises:
        UsageError: there is no such head, or no tensor of such a name.
        InputError: the heads.json is not valid, or tensors are not what the config says.
        Unsupported: it is not known where the model keeps its heads, or nothing in it can learn.
    """
    specs = learnable(checkpoint)
    if params.select == "heads":
        return _of_heads(checkpoint, params, specs)
    if params.select == "names":
        assert params.names is not None
        return Target({name: specs[name] for name in _matching(params.names, specs)})
    return Target(specs)


def _matching(patterns: Iterable[str], specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names that match a pattern, in the order of the checkpoint."""
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in specs if fnmatchcase(name, pattern)}
        if not matching:
            question = did_you_mean(pattern, specs)
            raise UsageError(
                "no tensor has such a name",
                where="names",
                expected=f"one of {len(specs)} tensors of floating point, such as {next(iter(specs), 'none')}",
                found=pattern,
                remedy=question or "list them with `regraft inspect --tensors`; * stands for any text",
            )
        chosen |= matching
    return [name for name in specs if name in chosen]


def _of_heads(checkpoint: Checkpoint, params: FineTuneParams, specs: Mapping[str, TensorSpec]) -> Target:
    architecture = architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())
    heads = _heads(params, architecture)
    shared = architecture.num_kv_heads < architecture.num_heads
    with_kv = not shared if params.kv is None else params.kv
    parts: dict[str, tuple[str, int, set[int], tuple[int, ...]]] = {}
    for layer, head in heads:
        for name, one, shape in _slices(architecture, layer, head, with_kv=with_kv):
            parameter, axis, indices, _ = parts.setdefault(name, (one.parameter, one.axis, set(), shape))
            assert (parameter, axis) == (one.parameter, one.axis)
            indices.update(one.indices)
    for name, (_, _, _, shape) in parts.items():
        _check(checkpoint, name, shape, specs)
    slices = {
        name: Slice(parts[name][0], parts[name][1], tuple(sorted(parts[name][2]))) for name in specs if name in parts
    }
    return Target({name: specs[name] for name in slices}, slices, tuple(heads))


def _heads(params: FineTuneParams, architecture: Architecture) -> list[Head]:
    given = params.heads
    assert given is not None
    if isinstance(given, Path):
        return sorted(read_heads_of(given, architecture.num_layers, architecture.num_heads).heads)
    check_heads(given, architecture.num_layers, architecture.num_heads, where="heads")
    return sorted(set(given))


def _slices(
    architecture: Architecture, layer: int, head: int, *, with_kv: bool
) -> Iterable[tuple[str, Slice, tuple[int, ...]]]:
    """Tensor, slice and shape of everything that belongs to one head: rows of weights and biases, columns of o_proj."""
    roles = [("q_proj", head)]
    if with_kv:
        group = architecture.kv_head_of(head)
        roles += [("k_proj", group), ("v_proj", group)]
    for role, number in roles:
        slot, rows = architecture.slot(role, layer), architecture.head_rows(role, layer, number)
        indices = tuple(range(rows.start, rows.stop))
        module = _module(architecture, slot.module, role, layer)
        yield slot.tensor, Slice(f"{module}.weight", slot.row_axis, indices), slot.shape
        if slot.bias is not None:
            yield slot.bias, Slice(f"{module}.bias", 0, indices), (slot.shape[slot.row_axis],)
    slot, columns = architecture.slot("o_proj", layer), architecture.head_columns(head)
    assert slot.column_axis is not None
    module = _module(architecture, slot.module, "o_proj", layer)
    indices = tuple(range(columns.start, columns.stop))
    yield slot.tensor, Slice(f"{module}.weight", slot.column_axis, indices), slot.shape


def _module(architecture: Architecture, path: str | None, role: str, layer: int) -> str:
    if path is None:
        raise Unsupported(
            f"{role} has no module of its own, so the slices of a head cannot learn",
            where=f"{architecture.model_type}, layer {layer}",
            remedy='train whole tensors: select = "names"',
        )
    return path


def _check(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], specs: Mapping[str, TensorSpec]) -> None:
    spec = checkpoint.tensor(name).spec
    if name not in specs:
        raise Unsupported(
            "quantised weights cannot learn", where=f"{checkpoint.label}: {name}", expected="floating point",
            found=spec.dtype, remedy="use the model's unquantised checkpoint",
        )  # fmt: skip
    if spec.shape != shape:
        raise InputError(
            "the tensor is not what the config says",
            where=f"{checkpoint.label}: {name}",
            expected=list(shape),
            found=list(spec.shape),
            remedy="correct config.json, or fetch the checkpoint again",
        )

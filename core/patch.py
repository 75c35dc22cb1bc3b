"""What a transformation returns, and a checkpoint seen through it.

A patch names edits, removals, renames, changes of JSON files and of other files. An overlay is a checkpoint again, so
patches stack without touching the disk, and N steps cost one read and one write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import PluginError
from regraft.core.jsonio import dump, merge, same
from regraft.core.low_rank import LowRankDelta
from regraft.core.operations import ComputedTensor, Operation, Value
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, PromisedTensor

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Edit:
    """How one output tensor is computed: its spec, and the operation on tensors of the checkpoint below."""

    spec: TensorSpec
    operation: Operation


@dataclass(frozen=True)
class Patch:
    """What one transformation does to a checkpoint. Lazy: nothing is read or computed until tensors are written.

    Args:
        edits: tensors that are rewritten or added, by name.
        removals: names of tensors that go.
        renames: new name -> old name, for tensors that move unchanged.
        json: merge patches (RFC 7396) by file name, such as `{"config.json": {"rope_theta": 5e5}}`.
        files: other files to add or replace, by relative path.
        dropped: files to leave behind, with the reason.
        metrics: numbers for the report, by name; JSON values.
        notes: sentences for the user and the model card.
        reports: plots, samples, scores and the like, by plain file name; they come to stand in `regraft/STEP/` of the
            output. The same run gives the same bytes: no times, no paths. Neither outlined nor kept in a saved patch.
    """

    edits: Mapping[str, Edit] = field(default_factory=dict)
    removals: frozenset[str] = frozenset()
    renames: Mapping[str, str] = field(default_factory=dict)
    json: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, FileRef] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reports: Mapping[str, FileRef] = field(default_factory=dict)

    @property
    def changes_nothing(self) -> bool:
        """Whether the checkpoint stays as it is; metrics, notes and reports may say why."""
        return not (self.edits or self.removals or self.renames or self.json or self.files or self.dropped)


@dataclass(frozen=True)
class DeltaSpec:
    """A low-rank delta, rounded to nearest, without its values.

    Args:
        left, right: dtypes and shapes of the factors, [rows, rank] and [rank, cols].
        scale: s.
    """

    left: tuple[str, tuple[int, ...]]
    right: tuple[str, tuple[int, ...]]
    scale: float

    @classmethod
    def of(cls, name: str, edit: Edit) -> DeltaSpec | None:
        """That of an edit of `name`, if the edit is nothing else."""
        delta = edit.operation
        if not isinstance(delta, LowRankDelta) or delta.input != name or delta.seed is not None:
            return None
        left, right = delta.left.spec, delta.right.spec
        return cls((left.dtype, left.shape), (right.dtype, right.shape), delta.scale)

    def promised(self, name: str) -> LowRankDelta:
        """The operation, whose factors have no values yet."""
        left, right = (PromisedTensor(TensorSpec(name, *factor)) for factor in (self.left, self.right))
        return LowRankDelta(name, left, right, self.scale)


@dataclass(frozen=True)
class Outline:
    """What a step will do, known from headers and parameters alone.

    Args:
        specs: tensors that will be rewritten or added, by name.
        removals, renames, json, dropped: as in `Patch`.
        files: names and sizes in bytes of the files it adds or replaces (size None: known only after the run).
        notes: sentences for the plan.
        deltas: of the tensors in `specs` those that get a low-rank delta and nothing else; only such can be written as
            an adapter.
        exact: False where data decides a shape and the specs are upper bounds; a plan takes it for False in every
            step behind such a one.
        undecided: by JSON file, the top-level keys whose values are known only after the run; `json` may say what the
            plan assumes of them until then.
        or_nothing: whether data may decide that the step changes nothing at all, so that the patch is empty.
        workspace_bytes: host memory the step itself needs beside the writer's, at its peak.
        shared_bytes: of `workspace_bytes`, what the processes of a run share out among them, each its part.
        memory_remedy: what to set in the step so that it needs much less of it; empty where there is nothing.
        scratch_bytes: disk the step itself needs beside the output, such as for its saved state.
        form: what the step would have written where `[output] format` does not say it; None leaves it to others.
        unrecorded: what decides the result and is named by neither recipe nor base, such as a model that a file of the
            recipe names; then the result is not kept in the step cache. Empty where there is nothing of that kind.
        beyond_adapter: what the step does that an adapter cannot hold, in its own words, and what to set in the step
            instead; None where there is nothing, or nothing to be said of it.
    """

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    removals: frozenset[str] = frozenset()
    renames: Mapping[str, str] = field(default_factory=dict)
    json: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, int | None] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    deltas: Mapping[str, DeltaSpec] = field(default_factory=dict)
    exact: bool = True
    undecided: Mapping[str, frozenset[str]] = field(default_factory=dict)
    or_nothing: bool = False
    workspace_bytes: int = 0
    shared_bytes: int = 0
    memory_remedy: str = ""
    scratch_bytes: int = 0
    form: Literal["adapter", "checkpoint"] | None = None
    beyond_adapter: tuple[str, str] | None = None
    unrecorded: str = ""

    @classmethod
    def of(cls, patch: Patch) -> Outline:
        """The outline that `patch` fulfils exactly."""
        return cls(
            specs={name: edit.spec for name, edit in patch.edits.items()},
            removals=patch.removals,
            renames=patch.renames,
            json=patch.json,
            files={name: file.nbytes for name, file in patch.files.items()},
            dropped=patch.dropped,
            notes=patch.notes,
            deltas={name: delta for name, edit in patch.edits.items() if (delta := DeltaSpec.of(name, edit))},
        )

    def deviations(self, patch: Patch) -> list[str]:
        """Where `patch` is not what this outline promised; empty when it keeps its word."""
        if self.or_nothing and patch.changes_nothing:
            return []
        actual = Outline.of(patch)
        names = ("removals", "renames", "dropped")
        differing = [name for name in names if getattr(self, name) != getattr(actual, name)]
        if self._decided(self.json) != self._decided(actual.json):
            differing.append("json")
        if not self._keeps_specs(actual.specs):
            differing.append("specs")
        if any(actual.deltas.get(name) != delta for name, delta in self.deltas.items()):
            differing.append("deltas")
        sizes = {name: size for name, size in actual.files.items() if self.files.get(name, size) is not None}
        promised = {name: size for name, size in self.files.items() if size is not None}
        if set(self.files) != set(actual.files) or (self.exact and promised != sizes):
            differing.append("files")
        return differing

    def _decided(self, json: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The changes of JSON files that the plan knows; a file of which it knows none is left out."""
        kept = {
            name: {key: value for key, value in change.items() if key not in self.undecided.get(name, ())}
            for name, change in json.items()
        }
        return {name: change for name, change in kept.items() if change}

    def _keeps_specs(self, actual: Mapping[str, TensorSpec]) -> bool:
        """Whether the tensors are those promised; where data decides a shape, whether none is larger."""
        if self.exact or set(self.specs) != set(actual):
            return dict(self.specs) == dict(actual)
        return all(
            bound.dtype == actual[name].dtype
            and len(bound.shape) == len(actual[name].shape)
            and all(found <= most for found, most in zip(actual[name].shape, bound.shape, strict=True))
            for name, bound in self.specs.items()
        )


def overlay(below: Checkpoint, patch: Patch, *, by: str) -> Checkpoint:
    """`below` seen through `patch`. Order is kept; added tensors come last.

    Args:
        below: the checkpoint that the patch was made for.
        patch: the changes.
        by: the step's id, for messages.

    Raises:
        PluginError: the patch names tensors that do not exist, changes one in two ways, gives a row-local operation
            inputs with other rows than its output, names a file outside the folder, or holds what is not JSON.
    """
    computed = {name: _computed(below, name, edit, by) for name, edit in patch.edits.items()}
    return _assemble(below, computed, patch, patch.files, by)


def promise(below: Checkpoint, outline: Outline, *, by: str) -> Checkpoint:
    """`below` as it will look after a step, known from the step's outline; its changed tensors have no values yet.

    Raises:
        PluginError: as `overlay`.
    """
    promised: dict[str, LazyTensor] = {name: PromisedTensor(spec) for name, spec in outline.specs.items()}
    for name, delta in outline.deltas.items():
        promised[name] = _computed(below, name, Edit(outline.specs[name], delta.promised(name)), by)
    files = {name: FileRef(data=bytes(size or 0)) for name, size in outline.files.items()}
    return _assemble(below, promised, outline, files, by)


def _computed(below: Checkpoint, name: str, edit: Edit, by: str) -> ComputedTensor:
    inputs = tuple(_input(below, source, name, by) for source in edit.operation.inputs)
    if isinstance(edit.operation, Value) and edit.operation.tensor.spec.shape != edit.spec.shape:
        raise PluginError(
            "an edit brings a tensor of another shape",
            where=f"step {by}: {name}",
            expected=edit.spec,
            found=edit.operation.tensor.spec,
        )
    for source in inputs:
        if edit.operation.row_local and source.spec.rows != edit.spec.rows:
            raise PluginError(
                "a row-local operation needs inputs with as many rows as its output",
                where=f"step {by}: {name}",
                expected=f"{edit.spec.rows} rows",
                found=source.spec,
            )
    return ComputedTensor(edit.spec, edit.operation, inputs)


def _input(below: Checkpoint, name: str, output: str, by: str) -> LazyTensor:
    if name not in below.tensors:
        raise PluginError(
            "an edit reads a tensor that the checkpoint does not have", where=f"step {by}: {output}", found=name
        )
    return below.tensors[name]


def _assemble(
    below: Checkpoint, changed: Mapping[str, LazyTensor], change: Patch | Outline, files: Mapping[str, FileRef], by: str
) -> Checkpoint:
    for name, tensor in changed.items():
        if tensor.spec.name != name:
            raise PluginError("an edit names another tensor", where=f"step {by}: {name}", found=tensor.spec.name)
    tensors, shards = _tensors(below, changed, change, by)
    for name in [*files, *change.json]:
        _check_file_name(name, by)
    kept = {name: file for name, file in below.files.items() if name not in change.dropped}
    merged = {**kept, **files}
    for name, merge_patch in change.json.items():
        document = replace(below, files=merged).json(name)
        if (file := _merged(document, merge_patch, f"step {by}: {name}")) is not None:
            merged[name] = file
    left_behind = {**below.left_behind, **change.dropped}
    return replace(below, tensors=tensors, shards=shards, files=merged, left_behind=left_behind)


def _merged(document: Mapping[str, Any], change: Mapping[str, Any], where: str) -> FileRef | None:
    """The changed file; None if the change changes nothing, so that the bytes of the base stay."""
    result = merge(document, change)
    try:
        return None if same(result, document) else FileRef(data=dump(result))
    except (TypeError, ValueError) as error:
        raise PluginError(
            "a patch of a JSON file holds what is not JSON", where=where, found=error, remedy="give plain numbers"
        ) from None


def _check_file_name(name: str, by: str) -> None:
    path = PurePosixPath(name)
    inside = name and not path.is_absolute() and ".." not in path.parts and not set(name) & {"\0", "\\"}
    if not inside or name != path.as_posix():
        raise PluginError(
            "a patch names a file outside the checkpoint",
            where=f"step {by}",
            expected="a relative path inside the folder",
            found=ascii(name),
        )
    if name in ("model.safetensors", "model.safetensors.index.json") or _SHARD.fullmatch(name):
        raise PluginError("a patch writes weights as a file", where=f"step {by}", found=name, remedy="use edits")


def _tensors(
    below: Checkpoint, changed: Mapping[str, LazyTensor], change: Patch | Outline, by: str
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    new_name = {old: new for new, old in change.renames.items()}
    for name in [*change.removals, *new_name]:
        if name not in below.tensors:
            raise PluginError("a patch removes or renames a tensor that does not exist", where=f"step {by}: {name}")
    twice = [old for new, old in change.renames.items() if new_name[old] != new or old in change.removals]
    twice += [name for name in change.removals if name in changed]
    if twice:
        raise PluginError("a patch changes a tensor in two ways", where=f"step {by}: {twice[0]}")
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in below.tensors.items():
        if name in change.removals:
            continue
        target = new_name.get(name, name)
        if target in tensors or (target != name and target in changed):
            raise PluginError("a patch changes a tensor in two ways", where=f"step {by}: {target}")
        tensors[target] = changed.get(target) or (tensor if target == name else Renamed(target, tensor))
        if name in below.shards:
            shards[target] = below.shards[name]
    added = {name: tensor for name, tensor in changed.items() if name not in tensors}
    return {**tensors, **added}, shards


class Renamed(LazyTensor):
    """A tensor under another name."""

    def __init__(self, name: str, tensor: LazyTensor) -> None:
        self.spec = replace(tensor.spec, name=name)
        self.tensor = tensor
        self.sources = (tensor,)

    @property
    def row_local(self) -> bool:
        """As the tensor itself."""
        return self.tensor.row_local

    @property
    def raw(self) -> Any:
        """As the tensor itself."""
        return self.tensor.raw

    @property
    def held_bytes(self) -> int:
        """As the tensor itself."""
        return self.tensor.held_bytes

    def open(self, device: str = "cpu") -> Any:
        """As the tensor itself."""
        return self.tensor.open(device)

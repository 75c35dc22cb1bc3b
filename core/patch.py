"""What a transformation returns, and a checkpoint seen through it.

A patch names edits, removals, renames, changes of JSON files and of other files. An overlay is a checkpoint again, so
patches stack without touching the disk, and N steps cost one read and one write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import PluginError
from regraft.core.jsonio import dump, merge
from regraft.core.operations import ComputedTensor, Operation
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, PromisedTensor


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
    """

    edits: Mapping[str, Edit] = field(default_factory=dict)
    removals: frozenset[str] = frozenset()
    renames: Mapping[str, str] = field(default_factory=dict)
    json: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, FileRef] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outline:
    """What a step will do, known from headers and parameters alone.

    Args:
        specs: tensors that will be rewritten or added, by name.
        removals, renames, json, dropped: as in `Patch`.
        files: names and sizes in bytes of the files it adds or replaces (size None: known only after the run).
        notes: sentences for the plan.
        exact: False where data decides a shape and the specs are upper bounds.
        workspace_bytes: host memory the step itself needs beside the writer's, at its peak.
    """

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    removals: frozenset[str] = frozenset()
    renames: Mapping[str, str] = field(default_factory=dict)
    json: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, int | None] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exact: bool = True
    workspace_bytes: int = 0

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
        )

    def deviations(self, patch: Patch) -> list[str]:
        """Where `patch` is not what this outline promised; empty when it keeps its word."""
        actual = Outline.of(patch)
        names = ("removals", "renames", "json", "dropped", *(("specs",) if self.exact else ()))
        differing = [name for name in names if getattr(self, name) != getattr(actual, name)]
        sizes = {name: size for name, size in actual.files.items() if self.files.get(name, size) is not None}
        promised = {name: size for name, size in self.files.items() if size is not None}
        if set(self.files) != set(actual.files) or (self.exact and promised != sizes):
            differing.append("files")
        return differing


def overlay(below: Checkpoint, patch: Patch, *, by: str) -> Checkpoint:
    """`below` seen through `patch`. Order is kept; added tensors come last.

    Args:
        below: the checkpoint that the patch was made for.
        patch: the changes.
        by: the step's id, for messages.

    Raises:
        PluginError: the patch names tensors that do not exist, or changes one in two ways.
    """
    computed = {
        name: ComputedTensor(
            edit.spec, edit.operation, tuple(_input(below, source, name, by) for source in edit.operation.inputs)
        )
        for name, edit in patch.edits.items()
    }
    return _assemble(below, computed, patch, patch.files, by)


def promise(below: Checkpoint, outline: Outline, *, by: str) -> Checkpoint:
    """`below` as it will look after a step, known from the step's outline; its changed tensors have no values yet.

    Raises:
        PluginError: as `overlay`.
    """
    promised = {name: PromisedTensor(spec) for name, spec in outline.specs.items()}
    files = {name: FileRef(data=bytes(size or 0)) for name, size in outline.files.items()}
    return _assemble(below, promised, outline, files, by)


def _input(below: Checkpoint, name: str, output: str, by: str) -> LazyTensor:
    if name not in below.tensors:
        raise PluginError(
            "an edit reads a tensor that the checkpoint does not have", where=f"step {by}: {output}", found=name
        )
    return below.tensors[name]


def _assemble(
    below: Checkpoint, changed: Mapping[str, LazyTensor], change: Patch | Outline, files: Mapping[str, FileRef], by: str
) -> Checkpoint:
    tensors, shards = _tensors(below, changed, change, by)
    kept = {name: file for name, file in below.files.items() if name not in change.dropped}
    merged = {**kept, **files}
    for name, merge_patch in change.json.items():
        document = parse(merged, name, below)
        result = merge(document, merge_patch)
        if result != document:
            merged[name] = FileRef(data=dump(result))
    left_behind = {**below.left_behind, **change.dropped}
    return replace(below, tensors=tensors, shards=shards, files=merged, left_behind=left_behind)


def parse(files: Mapping[str, FileRef], name: str, below: Checkpoint) -> Mapping[str, Any]:
    """The JSON file `name` among `files`; empty if there is none."""
    return replace(below, files=files).json(name)


def _tensors(
    below: Checkpoint, changed: Mapping[str, LazyTensor], change: Patch | Outline, by: str
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    new_name = {old: new for new, old in change.renames.items()}
    for name in [*change.removals, *new_name]:
        if name not in below.tensors:
            raise PluginError("a patch removes or renames a tensor that does not exist", where=f"step {by}: {name}")
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

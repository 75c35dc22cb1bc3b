"""Saved patches: a `.regraft` folder with `patch.json`, `tensors.safetensors` and the files that the step added.

An operation with a `kind` is stored by its formula (parameters and operands: a few kilobytes for most methods); any
other by the tensor that it gives on the checkpoint it was made for.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from regraft.core.buffers import is_file
from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import InputError, PluginError, ResourceError, UsageError
from regraft.core.header import render_header
from regraft.core.jsonio import brief, dump, read_object
from regraft.core.low_rank import LowRankDelta
from regraft.core.operations import Convert, Operation, ScaleRows, Value
from regraft.core.patch import Edit, Patch, Renamed
from regraft.core.residual_operations import BiasUpdate, ScaleColumns
from regraft.core.row_map import RowMap
from regraft.core.shape_operations import Constant, Resize
from regraft.core.sparse_operations import ZeroLowest
from regraft.core.specs import ITEM_BYTES, TensorSpec, torch_dtype
from regraft.core.tensors import LazyTensor, WeightFile

PATCH_SCHEMA = 1
_DOCUMENT, _TENSORS, _FILES = "patch.json", "tensors.safetensors", "files"
_FORMULAS = (Value, Convert, ScaleRows, LowRankDelta, BiasUpdate, ScaleColumns, RowMap, Resize, Constant, ZeroLowest)
_KINDS: Mapping[str, type[Operation]] = {formula.kind: formula for formula in _FORMULAS}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _SavedSpec(_Strict):
    name: str
    dtype: Literal[tuple(ITEM_BYTES)]  # type: ignore[valid-type]
    shape: list[NonNegativeInt]

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, tuple(self.shape))


class _SavedEdit(_Strict):
    dtype: Literal[tuple(ITEM_BYTES)]  # type: ignore[valid-type]
    shape: list[NonNegativeInt]
    operation: Literal[tuple(_KINDS)]  # type: ignore[valid-type]
    parameters: dict[str, Any]
    operands: dict[str, str]
    inputs: list[_SavedSpec]


class _Document(_Strict):
    schema_: int = Field(alias="schema")
    edits: dict[str, _SavedEdit]
    removals: list[str]
    renames: dict[str, str]
    json_: dict[str, dict[str, Any]] = Field(alias="json")
    files: list[str]
    dropped: dict[str, str]
    metrics: dict[str, Any]
    notes: list[str]


def save_patch(patch: Patch, below: Checkpoint, above: Checkpoint, folder: Path) -> None:
    """Save `patch` as the folder `folder`, which appears complete or not at all.

    Args:
        patch: what a step returned.
        below: the checkpoint it was made for.
        above: `below` seen through it.
        folder: is made; must not exist.

    Raises:
        UsageError: the folder exists.
        ResourceError: it cannot be written.
        PluginError: the patch holds metrics or parameters that are not JSON, or a tensor that belies its spec.
    """
    if folder.exists():
        raise UsageError("the folder for the patch exists already", where=folder, remedy="remove it, or choose another")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(patch, below, above, partial)
        partial.rename(folder)
    except OSError as error:
        raise ResourceError(
            f"the patch cannot be saved: {error.strerror}", where=folder, remedy="choose another --save-patches folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(patch: Patch, below: Checkpoint, above: Checkpoint, partial: Path) -> None:
    (partial / _FILES).mkdir(parents=True)
    tensors: dict[str, LazyTensor] = {}
    edits = {name: _save_edit(name, edit, below, above, tensors) for name, edit in patch.edits.items()}
    document = {
        "schema": PATCH_SCHEMA,
        "edits": edits,
        "removals": sorted(patch.removals),
        "renames": dict(patch.renames),
        "json": {name: dict(change) for name, change in patch.json.items()},
        "files": sorted(patch.files),
        "dropped": dict(patch.dropped),
        "metrics": dict(patch.metrics),
        "notes": list(patch.notes),
    }
    for name, file in patch.files.items():
        path = partial / _FILES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file.copy_to(path)
    _write_tensors(partial / _TENSORS, tensors)
    (partial / _DOCUMENT).write_bytes(_rendered(document))


def _rendered(document: Mapping[str, Any]) -> bytes:
    try:
        return dump(document)
    except (TypeError, ValueError) as error:
        raise PluginError(
            "a patch holds metrics or parameters that are not JSON",
            found=error,
            remedy="report it to the author of the step's plugin",
        ) from None


def load_patch(folder: Path) -> tuple[Patch, dict[str, TensorSpec]]:
    """A saved patch, and the specs of the tensors that it reads; operands stay on disk until they are needed.

    Raises:
        InputError: it is no patch folder, or its contents contradict each other.
    """
    document = _read_document(folder)
    stored = WeightFile(folder / _TENSORS).tensors()
    try:
        edits = {name: _load_edit(name, item, stored) for name, item in document.edits.items()}
    except (ArithmeticError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise _malformed(folder, f"{type(error).__name__}: {error}") from None
    patch = Patch(
        edits=edits,
        removals=frozenset(document.removals),
        renames=document.renames,
        json=document.json_,
        files={name: _file(name, folder) for name in document.files},
        dropped=document.dropped,
        metrics=document.metrics,
        notes=tuple(document.notes),
    )
    return patch, {spec.name: spec.spec() for item in document.edits.values() for spec in item.inputs}


def _read_document(folder: Path) -> _Document:
    path = folder / _DOCUMENT
    if not path.is_file():
        raise InputError(
            f"is not a saved patch: it has no {_DOCUMENT}",
            where=folder,
            expected="a folder from --save-patches",
            remedy="name the folder NAME.regraft itself",
        )
    document = read_object(path)
    if document.get("schema") != PATCH_SCHEMA:
        raise InputError(
            "a patch of another version",
            where=path,
            expected=f"schema {PATCH_SCHEMA}",
            found=brief(document.get("schema")),
            remedy="save it again with this regraft",
        )
    try:
        return _Document.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise _malformed(folder, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _malformed(folder: Path, found: str) -> InputError:
    return InputError("the saved patch is malformed", where=folder / _DOCUMENT, found=found, remedy="save it again")


def _save_edit(
    name: str, edit: Edit, below: Checkpoint, above: Checkpoint, tensors: dict[str, LazyTensor]
) -> dict[str, Any]:
    operation: Operation = edit.operation
    if operation.kind not in _KINDS:
        operation = Value(above.tensors[name])
    operands = {role: f"{name}::{role}" for role in operation.operands}
    tensors.update({key: Renamed(key, operation.operands[role]) for role, key in operands.items()})
    return {
        "dtype": edit.spec.dtype,
        "shape": list(edit.spec.shape),
        "operation": operation.kind,
        "parameters": dict(operation.parameters),
        "operands": operands,
        "inputs": [_spec_json(below.specs[source]) for source in edit.operation.inputs],
    }


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _load_edit(name: str, item: _SavedEdit, stored: Mapping[str, LazyTensor]) -> Edit:
    spec = TensorSpec(name, item.dtype, tuple(item.shape))
    if missing := [key for key in item.operands.values() if key not in stored]:
        raise ValueError(f"{_TENSORS} has no {missing[0]}")
    operands = {role: stored[key] for role, key in item.operands.items()}
    inputs = tuple(source.name for source in item.inputs)
    operation = _KINDS[item.operation].restore(inputs, item.parameters, operands)
    if isinstance(operation, Value) and operation.tensor.spec.shape != spec.shape:
        raise ValueError(f"{name} is stored as {list(operation.tensor.spec.shape)}, not {list(spec.shape)}")
    return Edit(spec, operation)


def _file(name: str, folder: Path) -> FileRef:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(
            "the saved patch names a path outside its folder",
            where=folder / _DOCUMENT,
            found=ascii(name),
            remedy="do not trust this patch",
        )
    if not is_file(folder / _FILES / name):
        raise InputError("a file of the saved patch is missing", where=folder / _FILES / name, remedy="save it again")
    return FileRef(folder / _FILES / name)


def _write_tensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    import torch

    specs = [replace(tensor.spec, name=name) for name, tensor in tensors.items()]
    with path.open("wb") as file:
        file.write(render_header(specs, {"format": "pt"}))
        for tensor in tensors.values():
            values = tensor.load()
            if (values.dtype, tuple(values.shape)) != (torch_dtype(tensor.spec.dtype), tensor.spec.shape):
                raise PluginError(
                    "a tensor of a patch loads otherwise than its spec says", where=tensor.spec.name,
                    expected=tensor.spec, found=f"{values.dtype}, {list(values.shape)}",
                    remedy="report it to the author of the step's plugin",
                )  # fmt: skip
            file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)

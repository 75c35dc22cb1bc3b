"""Saved patches: a `.regraft` folder with `patch.json`, `tensors.safetensors` and the files that the step added.

An operation with a `kind` is stored by its formula (parameters and operands: a few kilobytes for most methods); any
other by the tensor that it gives on the checkpoint it was made for.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import InputError, UsageError
from regraft.core.header import render_header
from regraft.core.jsonio import dump, read_object
from regraft.core.low_rank import LowRankDelta
from regraft.core.operations import Convert, Operation, ScaleRows, Value
from regraft.core.patch import Edit, Patch, Renamed
from regraft.core.specs import ITEM_BYTES, TensorSpec
from regraft.core.tensors import LazyTensor, WeightFile

PATCH_SCHEMA = 1
_DOCUMENT, _TENSORS, _FILES = "patch.json", "tensors.safetensors", "files"
_KINDS: Mapping[str, type[Operation]] = {kind.kind: kind for kind in (Value, Convert, ScaleRows, LowRankDelta)}


def save_patch(patch: Patch, below: Checkpoint, above: Checkpoint, folder: Path) -> None:
    """Save `patch` as the folder `folder`.

    Args:
        patch: what a step returned.
        below: the checkpoint it was made for.
        above: `below` seen through it.
        folder: is made; must not exist.

    Raises:
        UsageError: the folder exists.
    """
    if folder.exists():
        raise UsageError("the folder for the patch exists already", where=folder, remedy="remove it, or choose another")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
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
        path.write_bytes(file.read())
    _write_tensors(partial / _TENSORS, tensors)
    (partial / _DOCUMENT).write_bytes(dump(document))
    partial.rename(folder)


def load_patch(folder: Path) -> tuple[Patch, dict[str, TensorSpec]]:
    """A saved patch, and the specs of the tensors that it reads; operands stay on disk until they are needed.

    Raises:
        InputError: it is no patch folder, or its contents contradict each other.
    """
    if not (folder / _DOCUMENT).is_file():
        raise InputError(
            f"is not a saved patch: it has no {_DOCUMENT}", where=folder, expected="a folder from --save-patches"
        )
    document = read_object(folder / _DOCUMENT)
    if document.get("schema") != PATCH_SCHEMA:
        raise InputError(
            "a patch of another version",
            where=folder / _DOCUMENT,
            expected=f"schema {PATCH_SCHEMA}",
            found=document.get("schema"),
            remedy="save it again with this regraft",
        )
    stored = WeightFile(folder / _TENSORS).tensors()
    reads: dict[str, TensorSpec] = {}
    try:
        edits = {name: _load_edit(name, item, stored, reads) for name, item in document["edits"].items()}
        patch = Patch(
            edits=edits,
            removals=frozenset(document["removals"]),
            renames=document["renames"],
            json=document["json"],
            files={name: FileRef(folder / _FILES / _inside(name, folder)) for name in document["files"]},
            dropped=document["dropped"],
            metrics=document["metrics"],
            notes=tuple(document["notes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "the saved patch is malformed",
            where=folder / _DOCUMENT,
            found=f"{type(error).__name__}: {error}",
            remedy="save it again",
        ) from None
    return patch, reads


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
        "inputs": [_spec_json(below.specs[source]) for source in operation.inputs],
    }


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _load_edit(
    name: str, item: Mapping[str, Any], stored: Mapping[str, LazyTensor], reads: dict[str, TensorSpec]
) -> Edit:
    inputs = [TensorSpec(source["name"], source["dtype"], tuple(source["shape"])) for source in item["inputs"]]
    reads.update({spec.name: spec for spec in inputs})
    operands = {role: stored[key] for role, key in item["operands"].items()}
    operation = _KINDS[item["operation"]].restore(tuple(spec.name for spec in inputs), item["parameters"], operands)
    if item["dtype"] not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {item['dtype']}")
    return Edit(TensorSpec(name, item["dtype"], tuple(item["shape"])), operation)


def _inside(name: str, folder: Path) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            "the saved patch names a path outside its folder",
            where=folder / _DOCUMENT,
            found=name,
            remedy="do not trust this patch",
        )
    return name


def _write_tensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    import torch

    specs = [replace(tensor.spec, name=name) for name, tensor in tensors.items()]
    with path.open("wb") as file:
        file.write(render_header(specs, {"format": "pt"}))
        for tensor in tensors.values():
            values = tensor.load().contiguous().reshape(-1)
            file.write(memoryview(values.view(torch.uint8).numpy()) if values.numel() else b"")

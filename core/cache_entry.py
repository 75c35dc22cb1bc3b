"""One kept result of a step: its patch as a patch folder, its reports, and what makes the two equal what the step gave.

A patch folder alone would not do. The output must be the same, lock file included, whether the step ran or not; so a
tensor that was carried through is not kept by its values but by its name, and one that was computed remembers which
stored tensors it was computed from (their digests stand in the lock file) and whether its values are looked through
for NaN (what is computed is, what is copied is not).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.core.buffers import reading
from regraft.core.cache_folder import Held
from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import InputError
from regraft.core.jsonio import dump, read_object
from regraft.core.operations import Value, leaves
from regraft.core.patch import Edit, Patch
from regraft.core.patch_folder import load_patch, save_patch
from regraft.core.specs import TensorSpec
from regraft.core.tensors import ByteRange, LazyTensor, RowReader
from regraft.core.transfer import hash_range, new_hasher

ENTRY_SCHEMA = 1
FACTS, _SEAL, _PATCH, _REPORTS = "entry.json", "entry.xxh3", "patch", "reports"


class StoredValue(LazyTensor):
    """A tensor that a step computed, read from the cache; for everything around it as if it were computed now.

    Args:
        tensor: its values.
        sources: the stored tensors that it was computed from.
        row_local: whether it was computed row by row.
        held: keeps the entry while its bytes may be copied; None where they are computed again.
    """

    def __init__(
        self, tensor: LazyTensor, sources: tuple[LazyTensor, ...], *, row_local: bool, held: Held | None
    ) -> None:
        self.spec = tensor.spec
        self.tensor = tensor
        self.sources = sources
        self._row_local = row_local
        self._held = held

    @property
    def row_local(self) -> bool:
        """As the tensor was."""
        return self._row_local

    @property
    def raw(self) -> ByteRange | None:
        """Its bytes, if the step brought stored bytes along."""
        return self.tensor.raw if self._held is not None else None

    def open(self, device: str = "cpu") -> RowReader:
        """Reads the values."""
        return self.tensor.open(device)


@dataclass(frozen=True)
class Entry:
    """An entry as it stands in the cache."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(int(file["bytes"]) for file in self.facts["files"].values())


def entry_bytes(patch: Patch, below: Checkpoint) -> int:
    """About so many bytes an entry with `patch` takes: values, files and reports."""
    kept = _kept(patch, below)
    files = [*patch.files.values(), *patch.reports.values()]
    values = sum(_edit_bytes(edit) for name, edit in patch.edits.items() if name not in kept)
    return values + sum(file.nbytes for file in files)


def _edit_bytes(edit: Edit) -> int:
    if not edit.operation.kind:
        return edit.spec.nbytes
    return sum(operand.spec.nbytes for operand in edit.operation.operands.values())


def save_entry(folder: Path, patch: Patch, below: Checkpoint, above: Checkpoint, facts: Mapping[str, Any]) -> None:
    """Write an entry into `folder`, which exists and is empty.

    Args:
        folder: of the entry.
        patch: what the step returned.
        below: the checkpoint it was made for.
        above: `below` seen through it.
        facts: what the list of entries shows.

    Raises:
        ResourceError, OSError: it cannot be written.
        PluginError: the patch holds parameters that are not JSON.
    """
    kept = _kept(patch, below)
    stored = {name: edit for name, edit in patch.edits.items() if name not in kept}
    save_patch(replace(patch, edits=stored), below, above, folder / _PATCH)
    (folder / _REPORTS).mkdir()
    for name, file in patch.reports.items():
        _plain(folder / _REPORTS, name).write_bytes(file.read())
    document = {
        **facts,
        "schema": ENTRY_SCHEMA,
        "order": list(patch.edits),
        "files_order": list(patch.files),
        "reports": list(patch.reports),
        "kept": kept,
        "values": {name: _origin(above.tensors[name]) for name, edit in stored.items() if _by_value(edit)},
        "files": _digests(folder),
    }
    data = dump(document)
    (folder / FACTS).write_bytes(data)
    (folder / _SEAL).write_text(_digest_of(data))


def _kept(patch: Patch, below: Checkpoint) -> dict[str, Any]:
    """Edits that bring along a tensor of the checkpoint below: its name there, dtype and shape that it is to have."""
    names = {id(tensor): name for name, tensor in below.tensors.items()}
    return {
        name: {"tensor": source, "dtype": edit.spec.dtype, "shape": list(edit.spec.shape)}
        for name, edit in patch.edits.items()
        if isinstance(edit.operation, Value) and (source := names.get(id(edit.operation.tensor))) is not None
    }


def _by_value(edit: Edit) -> bool:
    return isinstance(edit.operation, Value) or not edit.operation.kind


def _origin(tensor: LazyTensor) -> dict[str, Any]:
    return {"copied": tensor.raw is not None, "row_local": tensor.row_local, "computed_from": list(leaves(tensor))}


def read_entry(folder: Path) -> Entry:
    """The entry in `folder`; of its files only the list is read.

    Raises:
        InputError: it is damaged.
    """
    facts = read_object(folder / FACTS)
    if _digest_of((folder / FACTS).read_bytes()) != _sealed(folder):
        raise _damaged(folder, f"{FACTS} has changed")
    return Entry(folder, facts)


def check_entry(entry: Entry) -> None:
    """Compare every file of an entry with its digest.

    Raises:
        InputError: one has changed, or has gone.
    """
    for name, stated in entry.facts["files"].items():
        path = entry.folder / name
        if not path.is_file() or path.stat().st_size != stated["bytes"] or _digest(path) != stated["xxh3"]:
            raise _damaged(entry.folder, f"{name} has changed" if path.is_file() else f"{name} has gone")


def load_entry(entry: Entry, below: Checkpoint, held: Held) -> Patch:
    """The patch of an entry that `check_entry` found sound; values stay on disk until they are needed.

    Args:
        entry: is read.
        below: the checkpoint that the step sees.
        held: the lock on the entry.

    Raises:
        InputError: it does not fit the checkpoint.
    """
    facts = entry.facts
    patch, _ = load_patch(entry.folder / _PATCH)
    stored = {leaf.spec.name: leaf for tensor in below.tensors.values() for leaf in leaves(tensor).values()}
    try:
        edits = {name: _edit(name, patch, facts, below, stored, held) for name in facts["order"]}
        files = {name: FileRef(data=patch.files[name].read()) for name in facts["files_order"]}
    except KeyError as error:
        raise _damaged(entry.folder, f"the checkpoint has no {error}") from None
    reports = {name: FileRef(data=_plain(entry.folder / _REPORTS, name).read_bytes()) for name in facts["reports"]}
    return replace(patch, edits=edits, files=files, reports=reports)


def _edit(
    name: str,
    patch: Patch,
    facts: Mapping[str, Any],
    below: Checkpoint,
    stored: Mapping[str, LazyTensor],
    held: Held,
) -> Edit:
    if (kept := facts["kept"].get(name)) is not None:
        spec = TensorSpec(name, kept["dtype"], tuple(kept["shape"]))
        return Edit(spec, Value(below.tensors[kept["tensor"]]))
    edit = patch.edits[name]
    if name not in facts["values"]:
        return edit
    origin = facts["values"][name]
    assert isinstance(edit.operation, Value)
    sources = tuple(stored[source] for source in origin["computed_from"])
    value = StoredValue(
        edit.operation.tensor, sources, row_local=origin["row_local"], held=held if origin["copied"] else None
    )
    return Edit(edit.spec, Value(value))


def _plain(folder: Path, name: str) -> Path:
    if PurePosixPath(name).name != name:
        raise _damaged(folder.parent, f"a report named {name!r}")
    return folder / name


def _digests(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3": _digest(path)} for path in files
    }


def _digest(path: Path) -> str:
    hasher = new_hasher("xxh3")
    with reading(path) as descriptor:
        hash_range(descriptor, 0, path.stat().st_size, hasher, where=path)
    return hasher.hexdigest()


def _digest_of(data: bytes) -> str:
    hasher = new_hasher("xxh3")
    hasher.update(data)
    return hasher.hexdigest()


def _sealed(folder: Path) -> str:
    try:
        return (folder / _SEAL).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _damaged(folder: Path, found: str) -> InputError:
    return InputError(
        "a cache entry is damaged", where=folder, found=found, remedy="remove it: regraft cache verify --remove"
    )

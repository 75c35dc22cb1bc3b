"""`regraft verify DIR`: digests against the lock file, and a scan of every value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.core.buffers import is_file, reading
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError
from regraft.core.finite import NonFinite, count_in
from regraft.core.jsonio import brief, read_object
from regraft.core.lock_file import check_schema
from regraft.core.provenance import sha256
from regraft.core.sources.folder import INDEX, LOCK
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor
from regraft.core.transfer import hash_range, labelled, new_hasher
from regraft.core.verify.structure import Finding, are

_ALGORITHMS = ("xxh3", "sha256")
_REMEDY = "write the checkpoint again, or fetch it again"
_SHOWN = 3


def check_lock(folder: Path, checkpoint: Checkpoint) -> tuple[list[Finding], int]:
    """Recompute what the lock file of `folder` states. Gives the findings and how many digests agreed.

    Raises:
        InputError: the lock file is not JSON, or malformed, or of another version.
    """
    path = folder / LOCK
    if not path.is_file():
        return [Finding(f"there is no {LOCK}, so digests were not compared", checkpoint.label, fatal=False)], 0
    document = read_object(path)
    check_schema(document, path)
    stated = _table(document, "output", path)
    files, tensors = _entries(stated, "files", path), _entries(stated, "tensors", path)
    results = [*_files(folder, files), *_tensors(checkpoint, tensors, path)]
    notes = [*_unknown_files(checkpoint, files), *_undigested(checkpoint, tensors)]
    return [*(finding for finding in results if finding is not None), *notes], results.count(None)


def _table(document: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = document.get(key)
    if isinstance(value, Mapping):
        return value
    raise InputError("the lock file is malformed", where=f"{path}: {key}", expected="an object", found=brief(value),
                     remedy=_REMEDY)  # fmt: skip


def _entries(document: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Mapping[str, Any]]:
    found = _table(document, key, path)
    return {name: _table(found, name, path) for name in found}


def _files(folder: Path, stated: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding | None]:
    """A finding for each stated file that is not as stated; None for one that is."""
    for name, facts in stated.items():
        where, relative = f"{folder}: {name}", PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            yield Finding("the lock file names a path outside the folder", where, "a file in the folder", name)
        elif not is_file(folder / name):
            yield Finding("a file is missing", where, "the file that the lock file states", "no such file", _REMEDY)
        elif (found := sha256(folder / name)) == facts.get("sha256"):
            yield None
        else:
            yield Finding("the file has changed", where, f"sha256 {facts.get('sha256')}", f"sha256 {found}", _REMEDY)


def _tensors(checkpoint: Checkpoint, stated: Mapping[str, Mapping[str, Any]], path: Path) -> Iterator[Finding | None]:
    """A finding for each tensor that is not as stated; None for each digest that agrees."""
    for name, facts in stated.items():
        where, tensor = f"{checkpoint.label}: {name}", checkpoint.tensors.get(name)
        if tensor is None:
            yield Finding(
                "a tensor is missing", where, "the tensor that the lock file states", "no such tensor", _REMEDY
            )
        elif unlike := [key for key, found in _form(tensor.spec).items() if facts.get(key, found) != found]:
            expected, found = (_told(form, unlike) for form in (facts, _form(tensor.spec)))
            yield Finding("the tensor has another dtype or shape", where, expected, found, _REMEDY)
        elif (digest := facts.get("digest")) is not None:
            found = digest_as(tensor, digest, f"{path}: {name}")
            yield None if found == digest else Finding("the tensor has changed", where, digest, found, _REMEDY)
    for name in checkpoint.tensors:
        if name not in stated:
            yield Finding("a tensor is there that the lock file does not name", f"{checkpoint.label}: {name}",
                          "only tensors of the lock file", str(checkpoint.specs[name]), _REMEDY)  # fmt: skip


def _form(spec: TensorSpec) -> dict[str, Any]:
    """What a digest of bytes does not tell: the same bytes are other numbers under another dtype or shape."""
    return {"dtype": spec.dtype, "shape": list(spec.shape)}


def _told(form: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} {brief(form[key])}" for key in keys)


def digest_as(tensor: LazyTensor, stated: Any, where: str) -> str:
    """The digest of a stored tensor by the algorithm that the lock file used.

    Raises:
        InputError: that is none.
    """
    algorithm = str(stated).partition(":")[0]
    if algorithm not in _ALGORITHMS:
        raise InputError("the lock file is malformed", where=where, expected=f"a digest by {' or '.join(_ALGORITHMS)}",
                         found=brief(stated), remedy=_REMEDY)  # fmt: skip
    raw, hasher = tensor.raw, new_hasher(algorithm)
    assert raw is not None  # the tensors of a folder are stored
    with reading(raw.path) as descriptor:
        hash_range(descriptor, raw.offset, raw.nbytes, hasher, where=raw.path)
    return str(labelled(algorithm, hasher))


def _unknown_files(checkpoint: Checkpoint, stated: Mapping[str, Any]) -> list[Finding]:
    unknown = [name for name in (*checkpoint.files, *checkpoint.left_behind) if name not in {*stated, LOCK, INDEX}]
    if not unknown:
        return []
    message = f"{are(len(unknown), 'file')} there that the lock file does not name"
    return [Finding(message, checkpoint.label, found=_shown(unknown), fatal=False)]


def _undigested(checkpoint: Checkpoint, stated: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Linked weight files are not read when they are written, so the lock file cannot vouch for them."""
    without = [name for name, facts in stated.items() if facts.get("digest") is None]
    if not without:
        return []
    message = f"{are(len(without), 'tensor')} without a digest in the lock file, so the bytes were not compared"
    return [Finding(message, checkpoint.label, found=_shown(without), fatal=False)]


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def scan_values(checkpoint: Checkpoint) -> dict[str, NonFinite]:
    """NaN and Inf in every tensor, by name; reads everything."""
    counts = {name: count_in(tensor) for name, tensor in checkpoint.tensors.items()}
    return {name: count for name, count in counts.items() if count}

"""`regraft verify DIR`: digests against the lock file, and a scan of every value."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.finite import NonFinite, count_non_finite, looks_finite
from regraft.core.jsonio import read_object
from regraft.core.provenance import sha256
from regraft.core.sources.folder import LOCK
from regraft.core.tensors import row_chunks
from regraft.core.transfer import hash_range, labelled, new_hasher
from regraft.core.verify.structure import Finding


def check_lock(folder: Path, checkpoint: Checkpoint) -> tuple[list[Finding], int]:
    """Recompute what the lock file of `folder` states. Gives the findings and how many digests agreed.

    Raises:
        InputError: the lock file is not JSON.
    """
    path = folder / LOCK
    if not path.is_file():
        return [Finding(f"there is no {LOCK}, so digests were not compared", checkpoint.label, fatal=False)], 0
    stated = read_object(path).get("output")
    if not isinstance(stated, Mapping):
        return [
            Finding(
                "the lock file has no output section",
                f"{checkpoint.label}: {LOCK}",
                remedy="write the checkpoint again",
            )
        ], 0
    results = [*_files(folder, stated.get("files") or {}), *_tensors(checkpoint, stated.get("tensors") or {})]
    return [finding for finding in results if finding is not None], results.count(None)


def _files(folder: Path, stated: Mapping[str, Any]) -> Iterator[Finding | None]:
    for name, facts in stated.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            yield Finding("the lock file names a path outside the folder", f"{folder}: {name}")
        elif not path.is_file():
            yield Finding("a file is missing", f"{folder}: {name}", "the file that the lock states", "nothing")
        else:
            found = sha256(path)
            same = found == facts.get("sha256")
            yield (
                None
                if same
                else Finding("the file has changed", f"{folder}: {name}", f"sha256 {facts.get('sha256')}", found)
            )


def _tensors(checkpoint: Checkpoint, stated: Mapping[str, Any]) -> Iterator[Finding | None]:
    for name, facts in stated.items():
        where = f"{checkpoint.label}: {name}"
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.raw is None:
            yield Finding("a tensor is missing", where)
        elif facts.get("digest"):
            algorithm = str(facts["digest"]).partition(":")[0]
            hasher = new_hasher(algorithm)
            descriptor = os.open(tensor.raw.path, os.O_RDONLY)
            try:
                hash_range(descriptor, tensor.raw.offset, tensor.raw.nbytes, hasher)
            finally:
                os.close(descriptor)
            found = labelled(algorithm, hasher)
            yield (
                None
                if found == facts["digest"]
                else Finding("the tensor has changed", where, facts["digest"], str(found))
            )
    for name in checkpoint.tensors:
        if name not in stated:
            yield Finding("a tensor is there that the lock file does not name", f"{checkpoint.label}: {name}")


def scan_values(checkpoint: Checkpoint) -> dict[str, NonFinite]:
    """NaN and Inf in every tensor, by name; reads everything."""
    found: dict[str, NonFinite] = {}
    for name, tensor in checkpoint.tensors.items():
        read = tensor.open()
        total = NonFinite()
        for start, stop in row_chunks(tensor.spec) if tensor.row_local else [(0, tensor.spec.rows)]:
            rows = read(start, stop)
            if not looks_finite(rows):
                part = count_non_finite(rows)
                total = NonFinite(total.nan + part.nan, total.inf + part.inf)
        if total:
            found[name] = total
    return found

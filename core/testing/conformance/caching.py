"""The check that a step's result can be kept: out of the step cache it must be what the step gave."""

from __future__ import annotations

import os
from collections.abc import Mapping

from regraft.core.cache_entry import check_entry, load_entry, read_entry, save_entry
from regraft.core.cache_folder import Held
from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.jsonio import dump
from regraft.core.patch import Patch, overlay
from regraft.core.testing.checkpoints import bits
from regraft.core.testing.conformance.check import demand, named
from regraft.core.testing.conformance.subject import Subject
from regraft.core.testing.running import run_step

_REMEDY = "return in the patch all that the result is, as tensors, files, metrics, notes and reports of plain values"


def comes_out_of_the_cache(subject: Subject) -> None:
    """Kept as the step cache keeps results and read again, the patch gives the same tensors, files and records."""
    case = subject.case()
    ran = run_step(subject.kind, case.base, case.params)
    folder = subject.place("entry")
    folder.mkdir()
    save_entry(folder, ran.patch, ran.below, ran.checkpoint, {})
    entry = read_entry(folder)
    check_entry(entry)
    again = load_entry(entry, ran.below, Held(os.open(folder, os.O_RDONLY)))
    after = overlay(ran.below, again, by="step")
    parts = (
        ("tensors", _tensors(ran.checkpoint), _tensors(after)),
        ("files", _digests(ran.checkpoint.files), _digests(after.files)),
        ("reports", _digests(ran.patch.reports), _digests(again.reports)),
        ("records", _records(ran.patch), _records(again)),
    )
    for what, first, second in parts:
        differing = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
        demand(not differing, f"what the cache gives has other {what} than the step gave", where=subject.kind.name,
               found=named(differing), remedy=_REMEDY)  # fmt: skip


def _tensors(checkpoint: Checkpoint) -> Mapping[str, object]:
    return {name: (tensor.spec, bits(tensor.load())) for name, tensor in checkpoint.tensors.items()}


def _digests(files: Mapping[str, FileRef]) -> Mapping[str, object]:
    return {name: file.sha256() for name, file in files.items()}


def _records(patch: Patch) -> Mapping[str, object]:
    return {"metrics": dump(patch.metrics), "notes": patch.notes, "dropped files": dict(patch.dropped)}

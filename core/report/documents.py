"""The JSON documents that a page is made of: the lock file of an output, and results of `regraft eval --json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.core.errors import InputError
from regraft.core.jsonio import read_object
from regraft.core.lock_file import Document, Lock, lock_of, parsed
from regraft.core.sources.folder import LOCK


class Estimated(Document):
    """A value and its 95% interval."""

    value: float
    low: float | None = None
    high: float | None = None


class Figure(Estimated):
    """A figure of a model, beside that of its base."""

    base: Estimated | None = None
    difference: Estimated | None = None


class MeasuredTask(Document):
    """What one task measured."""

    task: str
    metric: str
    figures: Mapping[str, Figure]
    measured: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()


class Evaluation(Document):
    """A result of `regraft eval --json`."""

    checkpoint: str
    against: str | None = None
    device: str | None = None
    seed: int | None = None
    tasks: tuple[MeasuredTask, ...]
    plots: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def read_lock(folder: Path) -> Lock:
    """The lock file of an output.

    Raises:
        InputError: there is none, or it is malformed, or of another version.
    """
    path = folder / LOCK
    if not path.is_file():
        raise InputError(
            f"there is no {LOCK}, which says how the checkpoint was made", where=folder,
            expected="a folder that `regraft apply` wrote",
            remedy="for any two checkpoints, use `regraft diff A B --html FILE`",
        )  # fmt: skip
    return lock_of(read_object(path), path)


def read_evaluation(path: Path) -> Evaluation:
    """A result of `regraft eval --json`.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    return parsed(Evaluation, read_object(path), path, "give what `regraft eval --json` printed")

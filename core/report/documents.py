"""The JSON documents that a page is made of: the lock file of an output, and results of `regraft eval --json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from regraft.core.errors import InputError
from regraft.core.jsonio import brief, read_object
from regraft.core.sources.folder import LOCK
from regraft.core.specs import ITEM_BYTES, TensorSpec


class _Document(BaseModel):
    """A part of a document; what a later release adds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LockedTensor(_Document):
    """A tensor as it was written."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    digest: str | None = None

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor; 0 for a dtype that is not known."""
        return TensorSpec(name, self.dtype, self.shape).nbytes if self.dtype in ITEM_BYTES else 0


class LockedFile(_Document):
    """A file beside the weights."""

    bytes: int
    sha256: str


class LockedStep(_Document):
    """What one step did."""

    id: str
    use: str
    version: str | None = None
    plugin: str | None = None
    plugin_version: str | None = None
    data: Mapping[str, Any] = {}
    metrics: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()


class LockedBase(_Document):
    """What the steps started from."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str
    source: str | None = None
    digest: str | None = None
    tensors: Mapping[str, str] = {}


class LockedOutput(_Document):
    """What was written."""

    tensors: Mapping[str, LockedTensor]
    files: Mapping[str, LockedFile]
    left_behind: Mapping[str, str] = {}
    quantised: Mapping[str, Any] = {}


class Lock(_Document):
    """A lock file; see `regraft.core.provenance`."""

    regraft: str | None = None
    recipe: Mapping[str, Any]
    base: LockedBase
    steps: tuple[LockedStep, ...] = ()
    output: LockedOutput
    non_finite_inputs: Mapping[str, Any] = {}
    environment: Mapping[str, Any] = {}


class Estimated(_Document):
    """A value and its 95% interval."""

    value: float
    low: float | None = None
    high: float | None = None


class Figure(Estimated):
    """A figure of a model, beside that of its base."""

    base: Estimated | None = None
    difference: Estimated | None = None


class MeasuredTask(_Document):
    """What one task measured."""

    task: str
    metric: str
    figures: Mapping[str, Figure]
    measured: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()


class Evaluation(_Document):
    """A result of `regraft eval --json`."""

    checkpoint: str
    against: str | None = None
    device: str | None = None
    seed: int | None = None
    tasks: tuple[MeasuredTask, ...]
    plots: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


_Kind = TypeVar("_Kind", bound=BaseModel)


def read_lock(folder: Path) -> Lock:
    """The lock file of an output.

    Raises:
        InputError: there is none, or it is malformed.
    """
    path = folder / LOCK
    if not path.is_file():
        raise InputError(
            f"there is no {LOCK}, which says how the checkpoint was made", where=folder,
            expected="a folder that `regraft apply` wrote",
            remedy="for any two checkpoints, use `regraft diff A B --html FILE`",
        )  # fmt: skip
    return _parsed(Lock, read_object(path), path, "write the checkpoint again, or fetch it again")


def read_evaluation(path: Path) -> Evaluation:
    """A result of `regraft eval --json`.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    return _parsed(Evaluation, read_object(path), path, "give what `regraft eval --json` printed")


def _parsed(kind: type[_Kind], document: Mapping[str, Any], path: Path, remedy: str) -> _Kind:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(
            f"is malformed: {first['msg'][:1].lower()}{first['msg'][1:]}", where=f"{path}: {key}",
            found=None if first["type"] == "missing" else brief(first["input"]), remedy=remedy,
        ) from None  # fmt: skip

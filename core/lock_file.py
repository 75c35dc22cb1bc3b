"""`regraft.lock.json` as it is read: a stranger may have changed it, so its shape is known before anything is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regraft.core.errors import InputError
from regraft.core.jsonio import brief
from regraft.core.provenance import LOCK_SCHEMA
from regraft.core.specs import ITEM_BYTES, TensorSpec

_REMEDY = "write the checkpoint again, or fetch it again"
_MOST_THREADS, _MOST_CHARACTERS = 4096, 200
_SHAPES = {"model_type": "object", "dict_type": "object", "mapping_type": "object", "tuple_type": "list"}
"""What pydantic calls after classes of ours or of Python's."""


class Document(BaseModel):
    """A part of a document; what a later release adds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LockedTensor(Document):
    """A tensor as it was written."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    digest: str | None = None

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor; 0 for a dtype that is not known."""
        return TensorSpec(name, self.dtype, self.shape).nbytes if self.dtype in ITEM_BYTES else 0


class LockedFile(Document):
    """A file beside the weights."""

    bytes: int
    sha256: str


class LockedStep(Document):
    """What one step did."""

    id: str
    use: str
    version: str | None = None
    plugin: str | None = None
    plugin_version: str | None = None
    data: Mapping[str, str | Mapping[str, str]] = {}
    metrics: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()


class LockedBase(Document):
    """What the steps started from."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str
    source: str | None = None
    digest: str | None = None
    tensors: Mapping[str, str] = {}


class LockedOutput(Document):
    """What was written."""

    tensors: Mapping[str, LockedTensor]
    files: Mapping[str, LockedFile]
    left_behind: Mapping[str, str] = {}
    quantised: Mapping[str, Any] = {}


class Lock(Document):
    """A lock file; see `regraft.core.provenance`."""

    regraft: str | None = None
    recipe: Mapping[str, Any]
    base: LockedBase
    steps: tuple[LockedStep, ...] = ()
    output: LockedOutput
    non_finite_inputs: Mapping[str, Any] = {}
    environment: Mapping[str, Any] = {}


class _RecipeStep(Document):
    use: str
    id: str


class _RecipeBase(Document):
    model: str


class _Recipe(Document):
    base: _RecipeBase
    steps: tuple[_RecipeStep, ...] = ()


class _Origin(Document):
    source: str | None = None
    commit: str | None = None


class _Environment(Document):
    python: str | None = None
    packages: Mapping[str, str | None] = {}
    system: str | None = None
    machine: str | None = None
    device: str = "cpu"
    processes: int = 1
    torch_threads: Annotated[int, Field(ge=1, le=_MOST_THREADS)] | None = None


class _Published(Document):
    license: str | None = None


class _Runnable(Document):
    """What else of a lock file is read to run it again. The recipe's own parser judges the rest of the recipe."""

    recipe: _Recipe
    base: _Origin
    environment: _Environment
    published: _Published | None = None


_Kind = TypeVar("_Kind", bound=BaseModel)


def check_schema(document: Mapping[str, Any], path: Path) -> None:
    """Refuse the contents of a lock file of another version.

    Raises:
        InputError: it is.
    """
    if document.get("schema") != LOCK_SCHEMA:
        raise InputError("a lock file of another version", where=path, expected=f"schema {LOCK_SCHEMA}",
                         found=brief(document.get("schema")), remedy="use the regraft that wrote it")  # fmt: skip


def lock_of(document: Mapping[str, Any], path: Path) -> Lock:
    """The contents of the lock file `path`.

    Raises:
        InputError: it is malformed, or of another version.
    """
    check_schema(document, path)
    return parsed(Lock, document, path, _REMEDY)


def check_runnable(document: Mapping[str, Any], path: Path) -> None:
    """Refuse a lock file that cannot be run again, whatever is installed.

    Raises:
        InputError: as `lock_of`; or what ran is not what the recipe says.
    """
    lock = lock_of(document, path)
    recipe = parsed(_Runnable, document, path, _REMEDY).recipe
    stated, ran = ([(step.id, step.use) for step in steps] for steps in (recipe.steps, lock.steps))
    if stated != ran:
        raise InputError(
            "the steps that ran are not those of the recipe", where=f"{path}: steps", expected=_steps(stated),
            found=_steps(ran), remedy=_REMEDY,
        )  # fmt: skip


def _steps(pairs: list[tuple[str, str]]) -> str:
    return brief([f"{name} ({use})" for name, use in pairs])


def parsed(kind: type[_Kind], document: Mapping[str, Any], path: Path, remedy: str) -> _Kind:
    """The contents of the file `path` as a `kind`.

    Raises:
        InputError: it is malformed; with the first key that is.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))[:_MOST_CHARACTERS]
        shape = _SHAPES.get(first["type"])
        why = f"input should be a valid {shape}" if shape else first["msg"][:1].lower() + first["msg"][1:]
        raise InputError(
            f"is malformed: {why}", where=f"{path}: {key}",
            found=None if first["type"] == "missing" else brief(first["input"]), remedy=remedy,
        ) from None  # fmt: skip

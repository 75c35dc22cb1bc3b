"""What a recipe is once it is valid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from regraft.core.recipe.document import SCHEMA_VERSION
from regraft.core.recipe.references import ModelReference, OutputPath, Reference
from regraft.core.recipe.wording import KeyPath, value_text

DEFAULT_SHARD_BYTES = 5 * 10**9

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))? *([A-Za-z]+)", re.ASCII)
SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)? *([KMGT]i?)?B$"


def size_bytes(value: Any) -> int:
    """Bytes of a size such as `5GB`, `1.5 GiB` or 4096; GB is 10^9, GiB is 2^30.

    Raises:
        PydanticCustomError: it is no size, or less than one byte.
    """
    count = value if type(value) is int else _parse_size(value) if isinstance(value, str) else None
    if count is None or count < 1:
        raise PydanticCustomError(
            "size", 'expected a size such as "5GB", "500MB" or "2GiB", or a number of bytes, found {found}',
            {"found": value_text(value)},
        )  # fmt: skip
    return count


def _parse_size(text: str) -> int | None:
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[3].upper()) if match else None
    if match is None or unit is None:
        return None
    fraction = match[2] or ""
    count = int(match[1] + fraction) * unit
    return count // int("1" + "0" * len(fraction))


Size = Annotated[
    int,
    BeforeValidator(size_bytes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "format": "byte-size", "pattern": SIZE_PATTERN},
                {"type": "integer", "minimum": 1},
            ]
        }
    ),
]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", json_schema_extra={"format": "name"})]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Frozen):
    """The checkpoint that the steps start from."""

    model: ModelReference = Field(
        description="A folder, a .safetensors or .gguf file, a hub id, or demo:tiny. "
        "A relative path starts at the folder of the recipe."
    )
    revision: str | None = Field(default=None, min_length=1, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(
        default=False,
        description="Run the model's own Python code where loading it needs that. Off unless you trust its authors.",
    )


class Output(_Frozen):
    """Where the result goes, and how it is stored."""

    path: OutputPath | None = Field(
        default=None, description="The folder to write; a relative path starts at the current folder."
    )
    dtype: Literal["keep", "bfloat16", "float16", "float32"] = Field(
        default="keep", description="The dtype that floating-point tensors are stored in."
    )
    shard_size: Size = Field(
        default=DEFAULT_SHARD_BYTES, description="The largest size of one file, in bytes or as 5GB (10^9), 2GiB (2^30)."
    )
    format: Literal["checkpoint", "adapter"] | None = Field(
        default=None,
        description="A whole checkpoint, or what the steps add to the base as a PEFT adapter; for steps that make "
        "low-rank deltas and nothing else. Default: what the steps ask for, as vlora does; otherwise a checkpoint.",
    )
    quantize: Literal["keep", "none", "nf4", "int8"] = Field(
        default="keep",
        description="Store in a bitsandbytes format. keep: as the base, so that a base quantised by bitsandbytes stays "
        "quantised; none: dequantised.",
    )
    minimum_cosine: float = Field(
        default=0.9,
        ge=-1.0,
        le=1.0,
        description="In an output that keeps its base's quantisation: the least cosine, for every changed weight, "
        "between the change that the new codes store and the one that the steps ask for.",
    )
    digest: Literal["xxh3", "sha256", "none"] = Field(
        default="xxh3", description="How the bytes of files are fingerprinted."
    )
    verify: Literal["structure", "load", "forward"] = Field(
        default="structure", description="How deeply the result is checked before it appears under its name."
    )

    @model_validator(mode="after")
    def _adapter_settings(self) -> Self:
        """Refuse beside an adapter what is said of a whole checkpoint."""
        if self.format == "adapter" and (key := self.checkpoint_key):
            raise PydanticCustomError(
                "adapter", '{key} is for whole checkpoints, and format is "adapter": leave it out', {"key": key}
            )
        return self

    @property
    def checkpoint_key(self) -> str | None:
        """The first key that says something of whole checkpoints alone; None where all are as they are by default."""
        keys = ("quantize", "minimum_cosine", "shard_size", "verify")
        return next((key for key in keys if getattr(self, key) != type(self).model_fields[key].default), None)

    def changes_weights(self) -> bool:
        """Whether the output differs from the base even without a step: another dtype, quantisation or sharding."""
        return self.dtype != "keep" or self.quantize != "keep" or self.shard_size != DEFAULT_SHARD_BYTES


class Settings(_Frozen):
    """The part of a recipe that no plugin describes."""

    name: Name | None = Field(
        default=None,
        description="Name of the result; by default that of the file. Not inherited by `extends`.",
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Everything random derives from it.")
    base: Base
    output: Output = Field(default_factory=Output)


class Position(NamedTuple):
    """Where a step was written: the file as the user named it, and the line (from 1; None if it is not from a file)."""

    file: str
    line: int | None


class Step(_Frozen):
    """One use of a transformation, with its validated parameters."""

    id: str
    use: str
    params: SerializeAsAny[BaseModel]
    position: Position


class Recipe(_Frozen):
    """A valid recipe.

    Paths in it hold from the current folder, wherever the recipe lies. `path` is its file, as it was given; `sources`
    are all files that were read, the recipe first, then what it extends.
    """

    name: str
    seed: int
    base: Base
    steps: tuple[Step, ...]
    output: Output
    path: Path
    sources: tuple[Path, ...]
    _references: Mapping[KeyPath, Reference] = PrivateAttr(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the recipe's file."""
        return self.path.parent

    def with_references(self, references: Mapping[KeyPath, Reference]) -> Self:
        """The same recipe, knowing how its paths were written."""
        copy = self.model_copy()
        copy._references = references
        return copy

    @property
    def writes_adapter(self) -> bool:
        """Whether the output is an adapter, to stand beside the base; before the plan, whether the recipe says so."""
        return self.output.format == "adapter"

    def with_format(self, form: Literal["checkpoint", "adapter"]) -> Self:
        """The same recipe, saying what it writes."""
        return self.model_copy(update={"output": self.output.model_copy(update={"format": form})})

    def resolved(self, relative_to: Path | None = None) -> dict[str, Any]:
        """The whole recipe with defaults filled in, as plain JSON values; itself a valid recipe without `extends`.

        Keys whose value is nothing are left out, and of a step all defaults where one of them may not be written. Paths
        that were written as relative stay relative, to the folder of the recipe or to `relative_to`; `[output] path`
        stays as it was written.
        """
        steps = [{"use": step.use, "id": step.id, **recorded(step.params)} for step in self.steps]
        resolved = {
            "schema": SCHEMA_VERSION, "name": self.name, "seed": self.seed,
            "base": _dump(self.base), "steps": steps, "output": _dump(self.output),
        }  # fmt: skip
        folder = self.folder if relative_to is None else relative_to
        for path, reference in self._references.items():
            _rewrite(resolved, path, reference, folder)
        return resolved


def _dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def recorded(params: BaseModel) -> dict[str, Any]:
    """A step's parameters as JSON values that are valid again: with defaults, or without where one may not be written.

    A step may refuse a parameter that has no effect beside another, even at its default.
    """
    complete = _dump(params)
    try:
        if type(params).model_validate(complete) == params:
            return complete
    except ValidationError:
        pass
    return params.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)


def _rewrite(resolved: Any, path: KeyPath, reference: Reference, folder: Path) -> None:
    """Write one path as `folder` would, unless the recipe was changed there after it was read."""
    for part in path[:-1]:
        resolved = _item(resolved, part)
    last: str | int = path[-1]
    if isinstance(table := _item(resolved, last), dict):  # the path was short for a table of which it is the source
        resolved, last = table, "source"
    if path[0] == "output":
        folder = reference.folder
    if _same_path(_item(resolved, last), reference.usable):
        _container(resolved, last)[last] = reference.relative_to(folder)


def _item(container: Any, part: str | int) -> Any:
    container = _container(container, part)
    if isinstance(container, dict):
        return container.get(part)
    return container[part] if isinstance(container, list) and isinstance(part, int) and part < len(container) else None


def _container(found: Any, part: str | int) -> Any:
    """What `part` is looked up in: the array `source` of a table for which an array was short, or what was found."""
    return found.get("source") if isinstance(part, int) and isinstance(found, dict) else found


def _same_path(found: Any, usable: str) -> bool:
    return isinstance(found, str) and Path(found).resolve() == Path(usable).resolve()

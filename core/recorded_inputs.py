"""The inputs that a lock file names: found where they are now, and held against their recorded digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, UsageError
from regraft.core.file_patterns import at_home, matched
from regraft.core.host import Host
from regraft.core.operations import leaves
from regraft.core.provenance import data_digests
from regraft.core.recipe.document import exists
from regraft.core.recipe.document import leaves as values_of
from regraft.core.recipe.load import recipe_from
from regraft.core.recipe.model import Recipe
from regraft.core.recipe.nodes import PATH_FORMATS, shape_of
from regraft.core.recipe.references import Reference
from regraft.core.recipe.shipped import shipped_names, shipped_path
from regraft.core.recipe.wording import KeyPath
from regraft.core.sources import open_checkpoint
from regraft.core.verify.lock import digest_as

_NO_ORIGIN = ("model", "digest", "tensors")
_ON_DISK = ("folder", "gguf")
"""Sources of bases that have no other place than a path."""
_REMEDY = "say where the inputs are: --base PATH, --data STEP.KEY=PATH, or --inputs DIR for relative paths"


@dataclass(frozen=True)
class Whereabouts:
    """Where the inputs of a record are.

    Args:
        base: the base; None takes the recorded name.
        data: paths by `STEP.KEY`.
        folder: where relative paths of the record start.
    """

    base: Path | None = None
    data: Mapping[str, Path] = field(default_factory=dict)
    folder: Path = Path()


class RecordedInputs:
    """A record with its inputs found; what is missing or wrong is collected, and told together.

    Args:
        record: contents of a lock file.
        lock: the lock file itself.
        host: the plugins, which know what of a step's parameters is an input.
        whereabouts: of the inputs.
    """

    def __init__(self, record: Mapping[str, Any], lock: Path, host: Host, whereabouts: Whereabouts) -> None:
        self._record, self._lock, self._host, self._whereabouts = record, lock, host, whereabouts
        self._problems: list[str] = []
        self._unused = set(whereabouts.data)

    def recipe(self) -> Recipe:
        """The recorded recipe, reading the inputs where they are now, and resolving to the recorded text.

        Raises:
            RecipeError: this regraft cannot run it.
        """
        data = deepcopy(dict(self._record["recipe"]))
        references: dict[KeyPath, Reference] = {}
        for index, step in enumerate(data.get("steps", [])):
            for place, written, usable in self._inputs(step, self._record["steps"][index]):
                references["steps", index, *place] = Reference(written, usable, self._lock.parent)
                _put(step, place, usable)
        self._tell_unused()
        if (there := self._base_place()) is not None:
            references["base", "model"] = Reference(data["base"]["model"], there, self._lock.parent)
            data["base"]["model"] = there
        recipe = recipe_from(data, self._lock, (), self._host.transformations(), self._host.broken)
        return recipe.with_references(references)

    def base(self) -> Checkpoint:
        """The base, as recorded but for where it is.

        Raises:
            InputError: it is not there.
        """
        stated = self._record["base"]
        origin = {key: value for key, value in stated.items() if key not in _NO_ORIGIN}
        model, place = str(stated.get("model")), self._base_place()
        if place is None and origin.get("source") in _ON_DISK:
            raise self._missing([*self._problems, f"base: there is no {model} in {self._whereabouts.folder}"])
        commit = origin.get("commit") if place is None else None
        try:
            checkpoint = open_checkpoint(place or model, revision=commit, extra=self._host.sources())
        except InputError as error:
            found = f"{error.where}: {error.message}" if error.where else error.message
            raise self._missing([*self._problems, f"base: {found}"]) from None
        return replace(checkpoint, label=model, origin=origin)

    def check(self, recipe: Recipe, base: Checkpoint) -> None:
        """Compare every input with its recorded digest.

        Raises:
            InputError: with all that are missing or differ.
        """
        problems = [*self._problems, *_base_problems(base, self._record["base"], self._lock)]
        for step, stated in zip(recipe.steps, self._record["steps"], strict=True):
            found = data_digests(step.params)
            for key, digest in stated.get("data", {}).items():
                if key in found and found[key] != digest:
                    problems.append(f"{step.id}.{key}: {_shown(found[key])}, not the recorded {_shown(digest)}")
        if problems:
            raise self._missing(problems)

    def _base_place(self) -> str | None:
        """Where the base is on this disk; None for a name that a source knows."""
        there = self._whereabouts.folder / at_home(self._record["base"]["model"])
        named = self._whereabouts.base or (there if exists(there) else None)
        return None if named is None else str(named.resolve())

    def _inputs(self, step: dict[str, Any], stated: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str, str]]:
        """Places of a step's inputs, as recorded and as they are now."""
        transformation = self._host.transformations().get(step["use"])
        if transformation is None:  # of a broken plugin, which the recipe's parser names
            return
        params: type[BaseModel] = transformation.Params
        values = {key: value for key, value in step.items() if key not in ("use", "id")}
        shape = shape_of(params)
        for place, written in values_of(values):
            formats = [node.get("format", "") for node in shape.at(place, values) if node.get("type") == "string"]
            kind = formats[0] if isinstance(written, str) and formats else ""
            if kind not in (*PATH_FORMATS, "data", "model"):
                continue
            key = _key(place)
            recorded = key in stated.get("data", {}) or f"{key}[0]" in stated.get("data", {})
            usable = self._place_of(f"{step['id']}.{key}", written)
            if usable is not None:
                yield place, written, usable
            elif recorded or kind in PATH_FORMATS:
                self._problems.append(f"{step['id']}.{key}: there is no {written} in {self._whereabouts.folder}")

    def _place_of(self, key: str, written: str) -> str | None:
        for name in (key, f"{key}[0]", key.removesuffix(".source"), key.removesuffix("[0]").removesuffix(".source")):
            if name in self._whereabouts.data:
                self._unused.discard(name)
                named = self._whereabouts.data[name]
                if named.exists() or matched(named):
                    return str(named.resolve())
                self._problems.append(f"{key}: there is no {named}")
                return None
        for folder in self._folders():
            if exists(there := folder / at_home(written)) or matched(there):
                return str(there.resolve())
        return None

    def _folders(self) -> Iterator[Path]:
        """Where relative paths may start: what a shipped recipe reads is shipped beside it."""
        yield self._whereabouts.folder
        name = str(self._record["recipe"].get("name"))
        if name in shipped_names():
            yield shipped_path(name).parent

    def _tell_unused(self) -> None:
        if self._unused:
            keys = [f"{step['id']}.{key}" for step in self._record["steps"] for key in step.get("data", {})]
            raise UsageError("the record has no such input", where=f"--data {min(self._unused)}",
                             expected=", ".join(keys) or "no data at all", remedy="name one of these")  # fmt: skip

    def _missing(self, problems: list[str]) -> InputError:
        return InputError(
            "inputs are missing, or are not the recorded ones", where=self._lock, found="; ".join(problems),
            remedy=_REMEDY,
        )  # fmt: skip


def _base_problems(base: Checkpoint, stated: Mapping[str, Any], lock: Path) -> Iterator[str]:
    if base.digest != stated.get("digest"):
        yield "base: its config, other files or shapes are not the recorded ones"
    packed = base.packed.tensors.values() if base.packed is not None else ()
    stored = {leaf.spec.name: leaf for tensor in (*base.tensors.values(), *packed) for leaf in leaves(tensor).values()}
    for name, digest in stated.get("tensors", {}).items():
        tensor = stored.get(name)
        if tensor is None:
            yield f"base: it has no tensor {name}"
            return
        if tensor.raw is not None and (found := digest_as(tensor, digest, f"{lock}: base: {name}")) != digest:
            yield f"base: {name} is {found}, not the recorded {digest}"
            return


def _key(place: KeyPath) -> str:
    """`data.source[0]`, as lock files name inputs."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _put(container: Any, place: KeyPath, value: str) -> None:
    for part in place[:-1]:
        container = container[part]
    container[place[-1]] = value


def _shown(digest: Any) -> str:
    return digest[:16] if isinstance(digest, str) else f"{len(digest)} files"

"""pydantic's validation errors, rewritten: one plain sentence each, at the place in the recipe that is to blame."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from regraft.core.recipe.nodes import Shape, choices, item_at, shape_of
from regraft.core.recipe.suggest import did_you_mean
from regraft.core.recipe.wording import KeyPath, listed, value_text

M = TypeVar("M", bound=BaseModel)

_SAID_BY_SCHEMA = frozenset({
    "literal_error", "enum", "greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of",
    "string_too_short", "string_too_long", "string_pattern_mismatch", "too_short", "too_long", "int_from_float",
})  # fmt: skip
"""Errors for which the schema's description of the place says what is expected; so do all `*_type` and `*_parsing`."""

_MISSING_PATHS = {
    "path_not_file": "there is no file",
    "path_not_directory": "there is no folder",
    "path_exists": "there is already a file or folder",
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with the value at `path`, which is relative to the model.

    `kind` is `text` for a number, boolean or date where text is expected.
    """

    path: KeyPath
    message: str
    remedy: str | None = None
    kind: Literal["value", "text", "unknown", "missing"] = "value"


@dataclass(frozen=True)
class _Located:
    """An error with its real path: `loc` without the names of union members, which `unions` holds, outermost first."""

    error: ErrorDetails
    path: KeyPath
    unions: tuple[tuple[KeyPath, str], ...] = ()

    def mismatch_at(self, point: KeyPath) -> bool:
        """Whether the value at `point` is of another kind altogether."""
        kind = self.error["type"]
        return self.path == point and (kind.endswith(("_type", "_parsing")) or kind in ("literal_error", "enum"))


def validate(model: type[M], data: Mapping[str, Any], written: Mapping[str, Any]) -> tuple[M | None, list[Fault]]:
    """Validate `data` strictly, as JSON is: no string passes for a number; paths, tuples, enums are understood.

    Args:
        model: the pydantic model.
        data: what is validated.
        written: the same as the user wrote it (paths not yet resolved), for messages.
    """
    text = json.dumps(data, default=_json)
    try:
        return model.model_validate_json(text, strict=True), []
    except ValidationError as error:
        explainer = _Explainer(shape_of(model), json.loads(text), written)
        return None, explainer.faults(error.errors(include_url=False))


def _json(value: Any) -> str:
    """Dates and times are what TOML has and JSON has not."""
    if isinstance(value, (date, time)):
        return value.isoformat()
    raise TypeError(f"no TOML value: {type(value)}")


class _Explainer:
    """Explains the errors of one validation."""

    def __init__(self, shape: Shape, data: Any, written: Any) -> None:
        self._shape, self._data, self._written = shape, data, written

    def faults(self, errors: Sequence[ErrorDetails]) -> list[Fault]:
        found = list(self._explain([self._locate(error) for error in errors]))
        return _without_doubles(found)

    def _locate(self, error: ErrorDetails) -> _Located:
        loc = error["loc"][:-1] if _about_key(error) else error["loc"]
        walks = list(_walks(loc, self._data, error["type"] == "missing"))
        for path, unions, value in walks:
            if value == error["input"]:
                return _Located(error, path, unions)
        return _Located(error, *walks[0][:2]) if walks else _Located(error, ())

    def _explain(self, located: list[_Located]) -> Iterator[Fault]:
        yield from (self._fault(item) for item in located if not item.unions)
        points: dict[KeyPath, dict[str, list[_Located]]] = {}
        for item in located:
            if item.unions:
                (point, member), *inner = item.unions
                points.setdefault(point, {}).setdefault(member, []).append(
                    _Located(item.error, item.path, tuple(inner))
                )
        for point, members in points.items():
            yield from self._union(point, members)

    def _union(self, point: KeyPath, members: dict[str, list[_Located]]) -> Iterator[Fault]:
        """One union: explain the member that was meant, or say what the members are."""
        meant = [items for items in members.values() if not any(item.mismatch_at(point) for item in items)]
        if not meant:
            yield self._expected(point)
            return
        yield from self._explain(min(meant, key=_misfit))

    def _fault(self, item: _Located) -> Fault:
        error, path = item.error, item.path
        kind, context = error["type"], error.get("ctx", {})
        match kind:
            case "extra_forbidden":
                return self._unknown(path)
            case "missing" if path and isinstance(path[-1], int):
                return self._expected(path[:-1])
            case "missing":
                return self._missing(path)
            case "union_tag_invalid" if tag := _tag(context):
                return self._expected((*path, tag))
            case "union_tag_not_found" if tag := _tag(context):
                return self._missing((*path, tag))
            case "value_error" | "assertion_error":
                reason = " ".join(str(context.get("error", "")).split())
                return Fault(path, reason or "this value is not accepted")
            case _ if kind in _MISSING_PATHS:
                return Fault(path, f"{_MISSING_PATHS[kind]} {value_text(error['input'])}")
            case _ if _about_key(error):
                return Fault(path, f"not a key that this table takes: {_plain(error['msg'])}")
            case _ if kind in _SAID_BY_SCHEMA or kind.endswith(("_type", "_parsing")):
                return self._expected(path, error)
        return Fault(path, _plain(error["msg"]))

    def _expected(self, path: KeyPath, error: ErrorDetails | None = None) -> Fault:
        nodes = self._shape.at(path, self._data)
        found = item_at(self._written, path)
        wanted = self._shape.describe(nodes)
        if not wanted and error is not None:
            return Fault(path, f"{_plain(error['msg'])}, found {value_text(found)}")
        names = [choice for choice in choices(nodes) if isinstance(choice, str)]
        remedy = did_you_mean(found, names) if isinstance(found, str) else None
        unquoted = error is not None and error["type"] == "string_type" and not isinstance(found, (dict, list))
        message = f"expected {wanted or 'another kind of value'}, found {value_text(found)}"
        return Fault(path, message, remedy, "text" if unquoted else "value")

    def _unknown(self, path: KeyPath) -> Fault:
        known = self._shape.keys(path[:-1], self._data)
        remedy = did_you_mean(str(path[-1]), known) or (f"known keys: {listed(known)}" if known else "remove it")
        return Fault(path, "unknown key", remedy, "unknown")

    def _missing(self, path: KeyPath) -> Fault:
        wanted = self._shape.describe(self._shape.at(path, self._data))
        return Fault(path, f"missing; expected {wanted}" if wanted else "missing", f"add {path[-1]} = ...", "missing")


def _walks(
    loc: tuple[int | str, ...],
    value: Any,
    missing: bool,
    path: KeyPath = (),
    unions: tuple[tuple[KeyPath, str], ...] = (),
) -> Iterator[tuple[KeyPath, tuple[tuple[KeyPath, str], ...], Any]]:
    """Every reading of pydantic's `loc` in which each part is a key, an index, or the name of a union member.

    Yields the real path, the union members on the way, and the value that pydantic should call the error's input.
    """
    if not loc:
        yield path, unions, value
        return
    part, rest = loc[0], loc[1:]
    inside = (
        part in value
        if isinstance(value, dict)
        else isinstance(part, int) and isinstance(value, list) and part < len(value)
    )
    if inside:
        yield from _walks(rest, value[part], missing, (*path, part), unions)
    elif missing and not rest:
        yield (*path, part), unions, value
    if isinstance(part, str):
        yield from _walks(rest, value, missing, path, (*unions, (path, part)))


def _about_key(error: ErrorDetails) -> bool:
    """Whether the error is about the key of a table with arbitrary keys, not about its value."""
    return error["loc"][-1:] == ("[key]",)


def _misfit(items: list[_Located]) -> tuple[int, int]:
    """How badly a union member fits: a wrong literal (such as a `kind`) speaks more against it than other faults."""
    return sum(item.error["type"] == "literal_error" for item in items), len(items)


def _without_doubles(faults: list[Fault]) -> list[Fault]:
    """One fault for each place, and none for a missing key that stands there mistyped."""
    mistyped = {(fault.path[:-1], fault.remedy) for fault in faults if fault.kind == "unknown"}
    kept: dict[KeyPath, Fault] = {}
    for fault in faults:
        if (
            fault.kind == "missing"
            and (fault.path[:-1], did_you_mean(str(fault.path[-1]), [str(fault.path[-1])])) in mistyped
        ):
            continue
        kept.setdefault(fault.path, fault)
    return list(kept.values())


def _tag(context: Mapping[str, Any]) -> str:
    """The key that tells the members of a discriminated union apart; empty if a function does."""
    name = str(context.get("discriminator", "")).strip("'")
    return "" if name.endswith("()") else name


def _plain(message: str) -> str:
    """A message of pydantic, or of a plugin's own error, without pydantic's turns of phrase."""
    for start, plain in (("Input should be ", "expected "), ("Value error, ", ""), ("Assertion failed, ", "")):
        if message.startswith(start):
            return plain + message.removeprefix(start)
    return message[:1].lower() + message[1:] if message[1:2].islower() else message

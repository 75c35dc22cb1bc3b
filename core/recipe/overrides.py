"""`--set KEY=VALUE`: values that replace those of the recipe before it is validated.

KEY is a dotted TOML key. Its first part is a top-level key (`output.dtype`, `seed`, `steps.0.method`) or the id of a
step (`honest.heads`). VALUE is read as a TOML value, and as a plain string if it is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import tomli

from regraft.core.errors import Problem
from regraft.core.recipe.document import Document, Place, depth_exceeds
from regraft.core.recipe.positions import ScanError, parse_key
from regraft.core.recipe.suggest import did_you_mean
from regraft.core.recipe.syntax import MAX_DEPTH
from regraft.core.recipe.wording import KeyPath, key_text, listed, quoted, value_text

TOP_LEVEL = ("schema", "name", "seed", "extends", "base", "steps", "output")
_ORDER = 1 << 20
"""Errors about options come after those about files."""


@dataclass(frozen=True)
class Override:
    """One option, taken apart; `key` is as it was typed."""

    key: str
    parts: tuple[str, ...]
    value: Any


class OverrideError(ValueError):
    """An option that cannot be applied: the option, the message and the remedy."""

    def __init__(self, option: str, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(message, file=option, remedy=remedy)


def apply_overrides(document: Document, overrides: Sequence[str]) -> tuple[Document, list[Problem]]:
    """The document with all options applied, in order, and the problems of those that could not be."""
    result = Document(deepcopy(document.data), dict(document.places), document.root)
    ids = step_ids(document.data)
    problems = []
    for order, text in enumerate(overrides, _ORDER):
        try:
            override = parse_override(text)
            path = _target(override, result.data, ids)
            result = _set(result, path, override, order)
        except OverrideError as error:
            problems.append(error.problem)
    return result, problems


def parse_override(text: str) -> Override:
    """Take `KEY=VALUE` apart.

    Raises:
        OverrideError: there is no key, or no `=` after it.
    """
    example = "write --set KEY=VALUE, such as --set output.dtype=bfloat16"
    try:
        parts, end = parse_key(text)
    except (ScanError, tomli.TOMLDecodeError):
        raise OverrideError(f"--set {text}", "expected a key", example) from None
    key = text[:end].strip()
    if not text.startswith("=", end):
        found = f", found {value_text(text[end:])}" if text[end:] else ""
        raise OverrideError(f"--set {key}", f'expected "=" and a value after the key{found}', example)
    value = parse_value(text[end + 1 :].strip())
    if len(parts) > MAX_DEPTH or depth_exceeds(value, MAX_DEPTH):
        raise OverrideError("--set", f"tables and arrays go deeper than {MAX_DEPTH} levels")
    return Override(key, parts, value)


def parse_value(text: str) -> Any:
    """The TOML value that the text is, or the text itself."""
    try:
        parsed = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def step_ids(data: Mapping[str, Any]) -> dict[str, int]:
    """Index of each step by its id; the first wins, and steps that have none are left out."""
    ids: dict[str, int] = {}
    steps = data.get("steps")
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        name = step.get("id", step.get("use")) if isinstance(step, dict) else None
        if isinstance(name, str):
            ids.setdefault(name, index)
    return ids


def _target(override: Override, data: Mapping[str, Any], ids: Mapping[str, int]) -> KeyPath:
    first, *rest = override.parts
    option = f"--set {override.key}"
    if first in ("extends", "schema"):
        raise OverrideError(option, f"`{first}` cannot be set from the command line", "change it in the recipe")
    if first == "steps" and rest and "steps" not in data:
        raise OverrideError(option, "the recipe has no steps", "add one to the recipe, or set the whole array")
    if first in TOP_LEVEL:
        return override.parts
    if first not in ids:
        settable = [key for key in TOP_LEVEL if key not in ("extends", "schema")]
        remedy = did_you_mean(first, [*ids, *settable]) or f"keys: {listed(settable)}; steps: {listed(ids) or 'none'}"
        raise OverrideError(option, f'"{first}" is neither a step of the recipe nor a top-level key', remedy)
    if not rest:
        raise OverrideError(option, f'"{first}" is a step', f"name one of its keys: --set {override.key}.KEY=VALUE")
    return ("steps", ids[first], *rest)


def _set(document: Document, path: KeyPath, override: Override, order: int) -> Document:
    """Put the value at `path`, with the tables on the way there; whatever stood there, and its places, are gone."""
    option = f"--set {override.key}"
    container: Any = document.data
    real: KeyPath = ()
    created: list[KeyPath] = []
    for part in path[:-1]:
        real = (*real, _key_in(container, part, real, option))
        if isinstance(container, dict) and part not in container:
            container[part] = {}
            created.append(real)
        container = container[real[-1]]
    real = (*real, _key_in(container, path[-1], real, option))
    container[real[-1]] = override.value
    place = Place(option, order=order, option=real)
    kept = {known: where for known, where in document.places.items() if known[: len(real)] != real}
    return Document(document.data, {**kept, **dict.fromkeys([*created, real], place)}, document.root)


def _key_in(container: Any, part: str | int, path: KeyPath, option: str) -> str | int:
    """The part as a key of this table or as an index into this array."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise OverrideError(option, f"{key_text(path)} is {value_text(container)}, which has no keys")
    digits = str(part)
    if digits.isascii() and digits.isdigit() and len(digits) < 10 and int(digits) < len(container):
        return int(digits)
    remedy = f"numbers count from 0; the last is {len(container) - 1}" if container else None
    raise OverrideError(option, f"{key_text(path)} is {value_text(container)} and has no {quoted(digits)}", remedy)

"""From the file of a recipe to a valid `Recipe`, or to every error in it at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from regraft.core.errors import Problem, RecipeError
from regraft.core.recipe.document import Document, Place, check_schema, depth_exceeds, read_recipe
from regraft.core.recipe.model import Base, Output, Recipe, Settings
from regraft.core.recipe.overrides import apply_overrides
from regraft.core.recipe.reading import Reading
from regraft.core.recipe.steps import OWN_KEYS, StepReader, Transformations
from regraft.core.recipe.suggest import closest
from regraft.core.recipe.syntax import MAX_DEPTH

NOT_SETTINGS = ("schema", "extends", "steps")
"""Top-level keys that `Settings` does not describe."""

_NONE: Mapping[str, Any] = MappingProxyType({})
HOMES: Mapping[str, str] = {
    **dict.fromkeys(Base.model_fields, "it belongs under [base]"),
    **dict.fromkeys(Output.model_fields, "it belongs under [output]"),
    **dict.fromkeys(
        ("schema", "name", "seed", "extends"), "it belongs at the top of the file, above the first [table]"
    ),
    **dict.fromkeys(OWN_KEYS, "it belongs in a [[steps]] table"),
}
"""Where a key belongs that stands where it is unknown."""


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    transformations: Transformations = _NONE,
    broken: Mapping[str, str] = _NONE,
) -> Recipe:
    """Read, complete and validate the recipe in the file `path`.

    Args:
        path: the file; messages name it as it is given here.
        overrides: `KEY=VALUE` texts of `--set`, applied in order over the recipe and what it extends.
        transformations: what steps can use, by name.
        broken: why a plugin cannot be used, by name.

    Raises:
        RecipeError: with everything that is wrong, ordered by position.
        PluginError: the recipe is sound, but uses a broken plugin, or one whose parameters have no JSON Schema.
    """
    document, sources = read_recipe(Path(path))
    return _build(document, sources, overrides, transformations, broken)


def recipe_from(
    data: Mapping[str, Any],
    file: str | Path,
    overrides: Sequence[str] = (),
    transformations: Transformations = _NONE,
    broken: Mapping[str, str] = _NONE,
) -> Recipe:
    """A recipe from plain values, such as those of `Recipe.resolved` in a lock file; `extends` is not followed.

    Args:
        data: the values.
        file: where they come from: named in messages, and relative paths start at its folder.
        overrides: as in `load_recipe`.
        transformations: as in `load_recipe`.
        broken: as in `load_recipe`.

    Raises:
        RecipeError: with everything that is wrong.
        PluginError: as in `load_recipe`.
    """
    path = Path(file)
    document = Document(dict(data), {}, Place(str(path), folder=path.parent))
    if depth_exceeds(document.data, MAX_DEPTH):
        raise RecipeError([document.problem((), f"tables and arrays go deeper than {MAX_DEPTH} levels")])
    if "extends" in data:
        raise RecipeError([document.problem(("extends",), "only a recipe file can extend another")])
    check_schema(document)
    return _build(document, (path,), overrides, transformations, broken)


def _build(
    document: Document,
    sources: tuple[Path, ...],
    overrides: Sequence[str],
    transformations: Transformations,
    broken: Mapping[str, str],
) -> Recipe:
    document, option_problems = apply_overrides(document, overrides)
    reading = Reading(document)
    settings = _settings(reading)
    reader = StepReader(reading, transformations, broken, HOMES)
    steps = reader.read()
    if reader.broken_uses and not (reading.problems() or option_problems):
        raise reader.broken_uses[0].error()
    for use in reader.broken_uses:
        reading.report(use.path, use.message, use.remedy)
    if problems := [*reading.problems(), *option_problems]:
        raise RecipeError(problems)
    assert settings is not None  # otherwise there is a problem
    if not steps and not settings.output.changes_weights():
        raise RecipeError([_does_nothing(document)])
    path = sources[0]
    recipe = Recipe(
        name=settings.name or _default_name(path), seed=settings.seed, base=settings.base, steps=steps,
        output=settings.output, path=path, sources=sources,
    )  # fmt: skip
    return recipe.with_references(reading.references)


def _settings(reading: Reading) -> Settings | None:
    """Everything but the steps; None if there are problems."""
    data = {key: value for key, value in reading.document.data.items() if key not in NOT_SETTINGS}
    known = [*Settings.model_fields, *NOT_SETTINGS]
    meant = {key: closest(key, known) for key in data if key not in known}
    for key, name in meant.items():
        if name in NOT_SETTINGS:
            reading.report((key,), "unknown key", f'did you mean "{name}"?')
    if "base" not in data and "base" not in meant.values():
        reading.report(("base",), "missing; a recipe starts from a checkpoint", 'add [base] with model = "..."')
    return reading.validated(Settings, data, (), HOMES)


def _does_nothing(document: Document) -> Problem:
    remedy = "add a [[steps]] table, or set [output] dtype, quantize or shard_size"
    return document.problem(
        (), "the recipe does nothing: it has no steps, and [output] keeps the weights as they are", remedy
    )


def _default_name(path: Path) -> str:
    """The name of the file without suffix, in the letters that names have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-_.") or "recipe"

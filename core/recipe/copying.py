"""A recipe copied to be changed, with the data and adapters that lie beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from regraft.core.recipe.model import Recipe


def copy_recipe(recipe: Recipe, target: Path, *, force: bool = False) -> list[Path]:
    """Copy the file of `recipe` to `target`, and what its steps read from its folder to where the copy expects it.

    Returns the files as they are called now, the recipe first.

    Raises:
        UsageError: one of them is there already and is another, without `force`.
        ResourceError: one cannot be written.
    """
    copies = {target: recipe.path} | {target.parent / name: recipe.folder / name for name in sorted(_beside(recipe))}
    for copy, original in copies.items():
        if copy.exists() and not force and (copy == target or copy.read_bytes() != original.read_bytes()):
            raise UsageError("the file exists already", where=copy, remedy="choose another name, or give --force")
    for copy, original in copies.items():
        try:
            if copy != target:
                copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, copy)
        except OSError as error:
            raise ResourceError(
                f"cannot be written: {error.strerror}", where=copy, remedy="choose another place"
            ) from None
    return list(copies)


def _beside(recipe: Recipe) -> Iterator[Path]:
    """Files in the recipe's folder that its steps read, relative to it."""
    from regraft.core.file_patterns import matched
    from regraft.core.plan import paths_of

    folder = recipe.folder.resolve()
    for step in recipe.steps:
        for _, path in paths_of(step.params):
            if path.resolve().is_relative_to(folder):
                files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
                files += matched(path).values()
                yield from (file.resolve().relative_to(folder) for file in files)

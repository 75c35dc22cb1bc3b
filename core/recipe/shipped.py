"""The recipes that ship with regraft, in the package `regraft.recipes`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from regraft.core.errors import Problem, RecipeError
from regraft.core.recipe.document import exists
from regraft.core.recipe.suggest import closest
from regraft.core.recipe.wording import listed, quoted

_SUFFIX = ".toml"


def shipped_names() -> list[str]:
    """Names of the shipped recipes, without suffix, in alphabetical order."""
    return sorted(path.stem for path in _folder().glob(f"*{_SUFFIX}"))


def shipped_path(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        RecipeError: there is no recipe of this name.
    """
    names = shipped_names()
    if name not in names:
        raise RecipeError([_unknown(name, names, [])])
    return _folder() / f"{name}{_SUFFIX}"


def shipped_text(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        RecipeError: there is no recipe of this name.
    """
    return shipped_path(name).read_text(encoding="utf-8")


def find_recipe(name: str) -> Path:
    """The file that a user means by `name`: a path, or else the name of a shipped recipe.

    A path that ends in `.toml` or has a folder in it is returned as it is, whether it exists or not.

    Raises:
        RecipeError: a bare name is neither a file nor a shipped recipe.
    """
    path = Path(name)
    if path.suffix == _SUFFIX or path.name != name or (exists(path) and not path.is_dir()):
        return path
    names = shipped_names()
    if name in names:
        return shipped_path(name)
    if exists(path):
        return path
    here = sorted(file.stem for file in Path().glob(f"*{_SUFFIX}"))
    raise RecipeError([_unknown(name, names, here)])


def _unknown(name: str, names: list[str], here: list[str]) -> Problem:
    """`names` are shipped; `here` are those of files in the current folder, without suffix."""
    meant = closest(name, [*here, *names])
    suffix = _SUFFIX if meant in here else ""
    question = "" if meant is None else f"did you mean {quoted(meant + suffix)}? "
    remedy = f"{question}shipped recipes: {listed(names) or 'none'}"
    return Problem(f"{quoted(name)} is neither a file nor the name of a shipped recipe", remedy=remedy)


def _folder() -> Path:
    return Path(str(resources.files("regraft.recipes")))

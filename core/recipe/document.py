"""A recipe as it was written: plain values, and for each of them the file, line and column that it comes from.

`read_recipe` follows `extends`. Merging keeps the place of every value, so that an error in an inherited value names
the file that wrote it, and a relative path is resolved against that file's folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from regraft.core.errors import Problem, RecipeError
from regraft.core.recipe.positions import key_positions
from regraft.core.recipe.suggest import closest
from regraft.core.recipe.syntax import MAX_DEPTH, parse_toml
from regraft.core.recipe.wording import KeyPath, key_text, quoted, value_text

SCHEMA_VERSION = 1
MAX_BYTES = 4 << 20
_MAX_INTEGER = 2**63 - 1
_OF_ONE_FILE = ("schema", "name", "extends")
"""Keys that speak of the file they stand in and are not inherited."""


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file with line and column (from 1), or a `--set` option.

    Args:
        folder: what relative paths written there are relative to.
        order: rank of the file among all that were read, for sorting errors.
        option: for a `--set` option, the path of the value that it sets.
    """

    file: str
    line: int | None = None
    column: int | None = None
    folder: Path = field(default_factory=Path)
    order: int = 0
    option: KeyPath | None = None

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts places: by file in the order of reading, by line and column, options last."""
        return self.order, self.line or 0, self.column or 0

    def problem(self, path: KeyPath, message: str, remedy: str | None = None) -> Problem:
        """The error `message` about the value at `path`, standing here."""
        key = "" if path == self.option else key_text(path)
        return Problem(message, key, self.file, self.line, self.column, remedy)

    def __str__(self) -> str:
        """`line 3 of base.toml`, or the option."""
        return self.file if self.line is None else f"line {self.line} of {self.file}"


@dataclass(frozen=True)
class Document:
    """Values and their places. `root` is the place of whatever is not there."""

    data: dict[str, Any]
    places: Mapping[KeyPath, Place]
    root: Place

    def place(self, path: KeyPath) -> Place:
        """Where the value at `path` was written, or else the nearest table or array around it."""
        for length in range(len(path), 0, -1):
            if found := self.places.get(path[:length]):
                return found
        return self.root

    def problem(self, path: KeyPath, message: str, remedy: str | None = None) -> Problem:
        """The error `message` about the value at `path`, at its place."""
        return self.place(path).problem(path, message, remedy)


def read_recipe(path: Path) -> tuple[Document, tuple[Path, ...]]:
    """The recipe in `path` merged over everything it extends, and the files that were read, the recipe itself first.

    Tables merge key by key and the extending recipe wins; any other value, `steps` included, is replaced whole.
    `schema` and `name` are not inherited.

    Raises:
        RecipeError: a file cannot be read, is not TOML or is empty; `extends` is no relative path or runs in a circle.
    """
    chain: list[Document] = []
    files: list[Path] = []
    while True:
        files.append(path)
        document = read_document(path, order=len(chain))
        chain.append(document)
        following = _extended(document, files)
        if following is None:
            break
        path = following
    merged = chain[-1]
    for child in reversed(chain[:-1]):
        merged = merge(merged, child)
    return merged, tuple(files)


def read_document(path: Path, order: int = 0) -> Document:
    """One file, without what it extends.

    Raises:
        RecipeError: it cannot be read, is not TOML, or is empty.
    """
    file = str(path)
    text = _decode(_read(path), file)
    data = parse_toml(text, file)
    root = Place(file, 1, 1, path.parent, order)
    if not data:
        remedy = "a recipe has [base] model, [[steps]] and [output] path; `regraft recipes` shows some"
        raise RecipeError([root.problem((), "the recipe is empty", remedy)])
    if depth_exceeds(data, MAX_DEPTH):
        raise RecipeError([root.problem((), f"tables and arrays go deeper than {MAX_DEPTH} levels")])
    places = {key: replace(root, line=line, column=column) for key, (line, column) in key_positions(text).items()}
    document = Document(data, places, root)
    check_schema(document)
    return document


def merge(parent: Document, child: Document) -> Document:
    """`child` laid over `parent`; places follow their values."""
    inherited = {key: value for key, value in parent.data.items() if key not in _OF_ONE_FILE}
    data = _merge_tables(inherited, child.data)
    places = {
        path: place
        for path, place in parent.places.items()
        if path[0] not in _OF_ONE_FILE and _inherits(path, child.data)
    }
    return Document(data, {**places, **child.places}, child.root)


def _merge_tables(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        inherited = merged.get(key)
        if isinstance(inherited, dict) and isinstance(value, dict):
            merged[key] = _merge_tables(inherited, value)
        else:
            merged[key] = value
    return merged


def _inherits(path: KeyPath, child: Any) -> bool:
    """Whether the parent's value at `path` survives under `child`."""
    for part in path:
        if not isinstance(child, dict):
            return False
        if part not in child:
            return True
        child = child[part]
    return isinstance(child, dict)


def _extended(document: Document, files: list[Path]) -> Path | None:
    """The file that `document` extends, checked not to be among `files`."""
    if "extends" not in document.data:
        return None
    value, place = document.data["extends"], document.place(("extends",))
    if not isinstance(value, str) or not value or "\0" in value:
        problem = place.problem(("extends",), f"expected the relative path of a recipe, found {value_text(value)}")
        raise RecipeError([problem])
    if Path(value).is_absolute() or value.startswith("~"):
        remedy = "write it relative to the folder of this recipe"
        raise RecipeError([place.problem(("extends",), f"expected a relative path, found {value_text(value)}", remedy)])
    path = place.folder / value
    if not exists(path):
        message = f"there is no file {path}"
        raise RecipeError(
            [place.problem(("extends",), message, _missing_remedy(path, "paths start at the folder of the recipe"))]
        )
    _refuse_cycle(path, files, place)
    return path


def _refuse_cycle(path: Path, files: list[Path], place: Place) -> None:
    seen = [file.resolve() for file in files]
    if path.resolve() in seen:
        names = [*map(str, files[seen.index(path.resolve()) :]), str(path)]
        message = f"the recipes extend each other in a circle: {' -> '.join(names)}"
        raise RecipeError([place.problem(("extends",), message, "remove one `extends`")])


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _unreadable(
            path,
            "there is no such recipe file",
            _missing_remedy(path, "`regraft recipes` lists those that ship with regraft"),
        ) from None
    except IsADirectoryError:
        raise _unreadable(path, "expected a recipe file, found a folder", _folder_remedy(path)) from None
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise _unreadable(path, f"the recipe cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise _unreadable(
            path, f"the file is larger than {MAX_BYTES >> 20} MiB, so it is no recipe", "name a TOML recipe"
        )
    return content


def _unreadable(path: Path, message: str, remedy: str | None = None) -> RecipeError:
    return RecipeError([Problem(message, file=str(path), remedy=remedy)])


def _missing_remedy(path: Path, otherwise: str) -> str:
    try:
        names = {entry.stem: entry.name for entry in sorted(path.parent.glob("*.toml"))}
    except (OSError, ValueError):
        names = {}
    meant = closest(path.stem, names)
    return otherwise if meant is None else f"did you mean {quoted(names[meant])}?"


def _folder_remedy(path: Path) -> str:
    recipes = sorted(path.glob("*.toml"))
    return f"name {recipes[0]}" if len(recipes) == 1 else "name the .toml file in it"


def _decode(content: bytes, file: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError([Problem("expected UTF-8 text, found UTF-16", "", file, 1, 1, "save the file as UTF-8")])
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8").replace("\r\n", "\n")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"expected UTF-8 text, found the byte 0x{content[error.start]:02x}"
        raise RecipeError([Problem(message, "", file, line, column, "save the file as UTF-8")]) from None


def check_schema(document: Document) -> None:
    """Refuse a recipe that is written for another version of the recipe format.

    Raises:
        RecipeError: it says so.
    """
    version = document.data.get("schema", SCHEMA_VERSION)
    if type(version) is not int or version != SCHEMA_VERSION:
        message = f"this regraft reads recipes of schema {SCHEMA_VERSION}, found {value_text(version)}"
        newer = type(version) is int and version > SCHEMA_VERSION
        remedy = "update regraft" if newer else f"write schema = {SCHEMA_VERSION} or leave it out"
        raise RecipeError([document.problem(("schema",), message, remedy)])


def number_problems(data: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str, str | None]]:
    """Path, message and remedy of numbers that a recipe cannot carry: beyond 64 bits, infinite, or not a number."""
    for path, leaf in leaves(data):
        if isinstance(leaf, int) and not -_MAX_INTEGER - 1 <= leaf <= _MAX_INTEGER:
            yield path, "the integer is too large", "integers have at most 64 bits"
        elif isinstance(leaf, float) and not math.isfinite(leaf):
            yield path, f"expected a finite number, found {leaf}", None


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is neither table nor array, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False for what cannot be a path at all."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether tables and arrays stand in each other more than `limit` levels deep; does not recurse."""
    layer = [value]
    for _ in range(limit + 1):
        layer = [item for item in layer if isinstance(item, (dict, list))]
        if not layer:
            return False
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    return True

"""Paths in recipes: what they are relative to, and how the lock file writes them.

A relative path in a recipe starts at the folder of the file that wrote it, so a recipe works from any current folder,
and a parent reached by `extends` keeps its own data beside itself. Three kinds of values are paths:

- a parameter of type `pathlib.Path` (or pydantic's `FilePath`, `DirectoryPath`);
- a `ModelReference`, such as `[base] model`: a folder or file if it looks like one (`./x`, `../x`, `x.safetensors`,
  `x.gguf`) or is there beside the recipe; otherwise it is handed on as it is: `demo:tiny`, a hub id;
- a `DataReference`, likewise: a file or folder of data, a pattern such as `texts/*.txt`, or a hub id;
- `[output] path`, the exception: results go where the user stands, so it starts at the current folder.

Values given by `--set` start at the current folder, as any path on a command line. `~` is the home folder.
"""

from __future__ import annotations

import os
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import WithJsonSchema

from regraft.core.file_patterns import is_pattern
from regraft.core.recipe.document import Document, exists, leaves
from regraft.core.recipe.nodes import PATH_FORMATS, Node, Shape, choices
from regraft.core.recipe.wording import KeyPath, quoted

ModelReference = Annotated[str, WithJsonSchema({"type": "string", "format": "model", "minLength": 1})]
"""A folder, a .safetensors or .gguf file, or a name that a source knows, such as a hub id. Validates to a string that
means the same from the current folder."""

DataReference = Annotated[str, WithJsonSchema({"type": "string", "format": "data", "minLength": 1})]
"""A data file, a folder of them, a pattern, or a name that the `datasets` library knows. Validates as a
`ModelReference`."""

OutputPath = Annotated[Path, WithJsonSchema({"type": "string", "format": "output-path", "minLength": 1})]
"""A place to write to, relative to the current folder."""

_NOUNS = {"model": "model", "data": "source of data"}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_FILES = {
    "model": (".safetensors", ".gguf"),
    "data": (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md"),
}
"""What tells a file, there or not, from a name."""


@dataclass(frozen=True)
class Reference:
    """A path of a recipe: as written, as it is from the current folder, and the folder that it was relative to."""

    written: str
    usable: str
    folder: Path

    def relative_to(self, folder: Path) -> str:
        """The path as `folder` would write it; absolute and `~` paths stay as they were written."""
        if self.written.startswith("~") or Path(self.written).is_absolute() or self.folder == folder:
            return self.written
        relative = Path(os.path.relpath(self.folder / self.written, folder)).as_posix()
        return _explicit(relative) if self.usable.startswith(("./", "../")) else relative


@dataclass(frozen=True)
class Resolved:
    """Parameters whose paths hold from the current folder, the paths that were found, and what is wrong with them.

    `problems` are path, message and remedy.
    """

    data: dict[str, Any]
    references: dict[KeyPath, Reference]
    problems: list[tuple[KeyPath, str, str | None]]


def resolve(document: Document, start: KeyPath, data: dict[str, Any], shape: Shape) -> Resolved:
    """Resolve every path in `data`, which stands at `start` in `document` and is described by `shape`."""
    resolved = Resolved(deepcopy(data), {}, [])
    for path, text in leaves(data):
        kind = _kind(shape.at(path, data), text) if isinstance(text, str) else None
        if kind is None:
            continue
        try:
            reference = _reference(kind, text, document.place((*start, *path)).folder)
        except _Refused as refused:
            resolved.problems.append((path, refused.message, refused.remedy))
            continue
        if reference is not None:
            resolved.references[path] = reference
            _put(resolved.data, path, reference.usable)
    return resolved


class _Refused(ValueError):
    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


def _kind(nodes: list[Node], text: str) -> str | None:
    """`path`, `output-path`, `model` or `data`; None where the schema takes the text as it is.

    Of several kinds of strings the first is what pydantic makes of the text; a literal choice goes before all of them.
    """
    formats = [node.get("format", "") for node in nodes if node.get("type") == "string" and not choices([node])]
    if text in choices(nodes) or not formats:
        return None
    kind = "path" if formats[0] in PATH_FORMATS else formats[0]
    return kind if kind in ("path", "output-path", *_FILES) else None


def _reference(kind: str, text: str, folder: Path) -> Reference | None:
    if not text:
        raise _Refused(f"expected a {_NOUNS.get(kind, 'path')}, found an empty string")
    if "\0" in text:
        raise _Refused("a path cannot hold the character U+0000")
    match kind:
        case "output-path":
            return Reference(text, _home(text), Path())
        case "model" | "data":
            return _named(text, folder, _FILES[kind], pattern=kind == "data" and is_pattern(text))
    return Reference(text, _joined(text, folder), folder)


def _named(text: str, folder: Path, suffixes: tuple[str, ...], *, pattern: bool) -> Reference | None:
    if _SCHEME.match(text):
        return None
    explicit = text in (".", "..") or text.startswith(("./", "../", "/", "~")) or text.endswith(suffixes)
    if explicit or pattern or exists(folder / text):
        usable = _joined(text, folder)
        return Reference(text, usable if folder == Path() else _explicit(usable), folder)
    if exists(Path(text)):
        there = _explicit(Path(os.path.relpath(text, folder)).as_posix())
        message = f"there is no {quoted(text)} beside the recipe, but there is one in the current folder"
        raise _Refused(message, f"paths start at the folder of the recipe: write {quoted(there)}")
    return None


def _joined(text: str, folder: Path) -> str:
    text = _home(text)
    return text if folder == Path() else str(folder / text)


def _home(text: str) -> str:
    return os.path.expanduser(text) if text.startswith("~") else text  # noqa: PTH111 - Path("~") raises without a home


def _explicit(path: str) -> str:
    """The path in a form that no hub id has."""
    return path if path.startswith(("/", "./", "../")) or path in (".", "..") else f"./{path}"


def _put(container: Any, path: KeyPath, value: str) -> None:
    for part in path[:-1]:
        container = container[part]
    container[path[-1]] = value

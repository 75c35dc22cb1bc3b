"""Sources of data that are patterns, such as `texts/**/*.txt`. Light: paths of recipes are told by it.

`*` and `?` stand for what they do in a shell, and `**` for any number of folders; hidden files are matched by none.
"""

from __future__ import annotations

import os
from glob import iglob
from pathlib import Path


def at_home(text: str) -> Path:
    """The path that a text means, with `~` and `~name` as homes; as it stands where there is no such home."""
    return Path(os.path.expanduser(text)) if text.startswith("~") else Path(text)  # noqa: PTH111 - raises


def is_pattern(source: str) -> bool:
    """Whether a text has what no path or name of a data set needs: `*` or `?`."""
    return "*" in source or "?" in source


def matched(source: str | Path) -> dict[str, Path]:
    """The files that a pattern matches, in order, by their paths from the folder where it begins; none for a path."""
    root, pattern = _parts(str(source))
    if not pattern:
        return {}
    escaped = pattern.replace("[", "[[]")
    found = iglob(escaped, root_dir=root, recursive=True)  # noqa: PTH207 - a Path matches hidden files, and no `**` files
    names = sorted({Path(name).as_posix() for name in found})
    return {name: path for name in names if (path := root / name).is_file()}


def from_pattern(source: str) -> str:
    """What remains of a pattern without the folder where it begins."""
    return _parts(source)[1]


def _parts(source: str) -> tuple[Path, str]:
    """The folder where a pattern begins, and the pattern from there; that is empty for a path."""
    path = at_home(source)
    if not is_pattern(source) or _exists(path):
        return path, ""
    first = next(place for place, part in enumerate(path.parts) if is_pattern(part))
    return Path(*path.parts[:first]), str(Path(*path.parts[first:]).as_posix())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for any file, no right to look, a zero byte
        return False

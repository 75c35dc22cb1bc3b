"""Writes a new plugin package: a transformation that works, its tests, and all that surrounds them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from regraft.core.errors import ResourceError, UsageError
from regraft.core.hookspecs import API_VERSION
from regraft.core.provenance import package_version
from regraft.core.recipe.overrides import TOP_LEVEL

if TYPE_CHECKING:
    from regraft.core.host import Host

PREFIX = "regraft-"
MAX_NAME = 40
_SPOKEN_FOR = frozenset({
    "AutoModelForCausalLM", "Checkpoint", "Conformance", "Edit", "False", "Field", "LAST", "None", "Operation",
    "Params", "Patch", "Scale", "TestConformance", "True", "Unsupported", "WeightSpace",
})  # fmt: skip
"""What the templates, or Python, call something else."""
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Names:
    """What a plugin is called in each place.

    Args:
        name: the transformation, as recipes use it, such as `scale-layers`.
    """

    name: str

    @property
    def distribution(self) -> str:
        """The package, as pip knows it: `regraft-scale-layers`."""
        return f"{PREFIX}{self.name}"

    @property
    def module(self) -> str:
        """The module: `regraft_scale_layers`."""
        return self.distribution.replace("-", "_")

    @property
    def stem(self) -> str:
        """The name in file names: `scale_layers`."""
        return self.name.replace("-", "_")

    @property
    def class_name(self) -> str:
        """The class: `ScaleLayers`; `ScaleStep` where `Scale` is something else in the package."""
        words = "".join(word.capitalize() for word in self.name.split("-"))
        return f"{words}Step" if words in _SPOKEN_FOR else words


def names_of(name: str) -> Names:
    """The names of a plugin called `name`; `regraft-` before it may be given.

    Raises:
        UsageError: it cannot be a name.
    """
    short = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(short) or len(short) > MAX_NAME or short in ("regraft", "testing", *TOP_LEVEL):
        raise UsageError(
            "cannot be the name of a plugin", where=ascii(name)[1:-1],
            expected=f"lower-case words and digits with hyphens between them, at most {MAX_NAME} characters, and no "
            f"key of a recipe ({', '.join(TOP_LEVEL)})",
            remedy="choose a name such as scale-layers",
        )  # fmt: skip
    return Names(short)


def new_plugin(name: str, folder: Path | None, host: Host) -> tuple[Path, list[str]]:
    """Write the package of a plugin called `name`.

    Args:
        name: of the transformation.
        folder: where to; by default `regraft-NAME` in the current folder. Must not exist, or be empty.
        host: whose transformations the name must not clash with.

    Returns:
        The folder, and the files in it by relative path.

    Raises:
        UsageError: the name cannot be one, or is taken; or the folder holds something.
        ResourceError: it cannot be written.
    """
    names = names_of(name)
    _check_free(names, host)
    target = folder or Path(names.distribution)
    _check_folder(target)
    contents = package_files(names)
    try:
        _write(target, contents)
    except OSError as error:
        raise ResourceError(
            f"cannot be written: {error.strerror}", where=target, remedy="choose another --path"
        ) from None
    return target, sorted(contents)


def package_files(names: Names) -> dict[str, str]:
    """The text of every file of the package, by relative path."""
    version = package_version("regraft") or "0"
    values = {
        **{key: getattr(names, key) for key in ("name", "distribution", "module", "stem", "class_name")},
        "api": f">={API_VERSION},<{int(API_VERSION.split('.')[0]) + 1}",
        "version": version,
        "next_version": _next_breaking(version),
    }
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        ".gitignore": "gitignore",
        ".github/workflows/tests.yml": "tests.yml",
        f"src/{names.module}/__init__.py": "module.py",
        f"tests/test_{names.stem}.py": "test_module.py",
    }
    return {place: _filled(template, values) for place, template in places.items()}


def _filled(template: str, values: Mapping[str, str]) -> str:
    source = files("regraft.core.plugin_kit").joinpath("template", f"{template}.template")
    return Template(source.read_text(encoding="utf-8")).substitute(values)


def _next_breaking(version: str) -> str:
    """The first version that may break what was written for `version`: 0.2 after 0.1.3, 2 after 1.4."""
    major, minor = (int(re.match(r"\d+", part)[0]) for part in [*version.split("."), "0"][:2])  # type: ignore[index]
    return f"0.{minor + 1}" if major == 0 else str(major + 1)


def _check_free(names: Names, host: Host) -> None:
    taken = {**host.owners, **dict.fromkeys(host.broken, "a plugin that is broken")}
    if names.name in taken:
        raise UsageError(
            "there is a transformation of this name", where=names.name, found=f"brought by {taken[names.name]}",
            remedy="choose another name; `regraft plugins` lists those that are taken",
        )  # fmt: skip
    if (version := package_version(names.distribution)) is not None:
        raise UsageError(
            "there is a package of this name", where=names.distribution, found=f"version {version} is installed",
            remedy="choose another name, or uninstall it",
        )  # fmt: skip


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError("is a file", where=folder, expected="a folder, new or empty", remedy="choose another --path")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            "the folder holds something already", where=folder, expected="a folder, new or empty",
            remedy="choose another --path",
        )  # fmt: skip


def _write(target: Path, contents: Mapping[str, str]) -> None:
    """All files, or, if one cannot be written, none."""
    existed = target.exists()
    try:
        for name, text in contents.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError:
        for path in target.iterdir() if target.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        if not existed:
            shutil.rmtree(target, ignore_errors=True)
        raise

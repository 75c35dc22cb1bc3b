"""Finds the plugin that `regraft plugins check` is asked about: installed, or in a folder that is not."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from regraft.core.errors import InputError, PluginError, UsageError
from regraft.core.host import GROUP, OWN_DISTRIBUTION, Host
from regraft.core.recipe.suggest import did_you_mean
from regraft.core.transformation import AnyTransformation


@dataclass(frozen=True)
class Found:
    """A package with plugins.

    Args:
        package: how messages name it.
        transformations: what it brings, by name.
    """

    package: str
    transformations: dict[str, type[AnyTransformation]]


def find_package(package: str) -> Found:
    """The transformations of `package`.

    Args:
        package: the name of an installed package or of a plugin; or a folder with a pyproject.toml.

    Raises:
        UsageError: there is none.
        InputError: the pyproject.toml names no plugin.
        PluginError: a plugin of it is broken.
    """
    entries = _from_folder(Path(package)) if _is_folder(package) else _installed(package)
    names = {entry.name for entry in entries}
    own = [entry for entry in entry_points(group=GROUP) if _distribution(entry) == OWN_DISTRIBUTION]
    host = Host([*entries, *(entry for entry in own if entry not in entries)], {})
    host.ask()
    found = {name: kind for name, kind in host.transformations().items() if host.owners[name] in names}
    for name, reason in host.broken.items():
        if name in names:
            raise PluginError("the plugin is broken", where=name, found=reason, remedy="repair it")
    return Found(package, found)


def _is_folder(package: str) -> bool:
    return "/" in package or (Path(package) / "pyproject.toml").is_file()


def _from_folder(folder: Path) -> list[EntryPoint]:
    """The entry points that the folder's pyproject.toml declares; its modules can be imported from now on."""
    import tomli

    path = folder / "pyproject.toml"
    try:
        declared: Any = tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("is no folder of a package", where=folder, expected="a pyproject.toml in it",
                         remedy="name the folder of a plugin, or an installed package") from None  # fmt: skip
    except (OSError, ValueError) as error:
        raise InputError("cannot be read", where=path, found=error, remedy="correct the file") from None
    plugins = declared
    for key in ("project", "entry-points", GROUP):
        plugins = plugins.get(key) if isinstance(plugins, dict) else None
    if not isinstance(plugins, dict) or not plugins:
        raise InputError(
            "declares no plugin", where=path, expected=f"[project.entry-points.{GROUP}]",
            remedy='add a line such as scale-layers = "regraft_scale_layers"',
        )  # fmt: skip
    places = [str(place.resolve()) for place in (folder / "src", folder) if place.is_dir()]
    sys.path[:0] = [place for place in places if place not in sys.path]
    return [EntryPoint(name, str(module), GROUP) for name, module in plugins.items()]


def _installed(package: str) -> list[EntryPoint]:
    every = list(entry_points(group=GROUP))
    found = [entry for entry in every if _normalised(_distribution(entry)) == _normalised(package)]
    found = found or [entry for entry in every if entry.name == package]
    if not found:
        known = {_distribution(entry) for entry in every} | {entry.name for entry in every}
        raise UsageError(
            "no such plugin is installed", where=package, expected="an installed package or plugin, or a folder",
            remedy=did_you_mean(package, known) or "`regraft plugins` lists what is installed",
        )  # fmt: skip
    return found


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else ""


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

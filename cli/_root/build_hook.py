"""Wheel build hook: lays the facade files of `cli/_root` and, in an editable install, links the rooms."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOMS = ("cli", "core", "kernels", "plugins", "recipes")
FACADE = ("__init__.py", "__main__.py", "py.typed", "testing.py")


class RoomsBuildHook(BuildHookInterface[Any]):
    """Maps the root folders onto the package `regraft`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Force-include the facade in a wheel; build `.hatch/editable/regraft` for an editable install."""
        root = Path(self.root)
        if version != "editable":
            build_data["force_include"].update(
                {str(root / "cli" / "_root" / name): f"regraft/{name}" for name in FACADE}
            )
            return
        package = root / ".hatch" / "editable" / "regraft"
        package.mkdir(parents=True, exist_ok=True)
        targets = {room: root / room for room in ROOMS} | {name: root / "cli" / "_root" / name for name in FACADE}
        for name, target in targets.items():
            link = package / name
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(target, package))

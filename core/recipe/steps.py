"""The steps of a recipe: the name of each is looked up, its id made unique, its parameters validated by its plugin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.core.errors import PluginError
from regraft.core.recipe.document import Place
from regraft.core.recipe.model import Position, Step
from regraft.core.recipe.overrides import TOP_LEVEL
from regraft.core.recipe.reading import Reading
from regraft.core.recipe.suggest import closest, did_you_mean
from regraft.core.recipe.wording import KeyPath, key_text, listed, quoted, value_text

if TYPE_CHECKING:
    from regraft.core.transformation import AnyTransformation

Transformations = Mapping[str, "type[AnyTransformation]"]
"""What steps can use, by name. Of each only `Params` is asked: a pydantic model that forbids unknown keys."""

ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
OWN_KEYS = ("use", "id")
"""Keys of a step that are not parameters."""


@dataclass(frozen=True)
class BrokenUse:
    """A step that uses a transformation whose plugin is broken."""

    place: Place
    path: KeyPath
    use: str
    reason: str

    @property
    def message(self) -> str:
        """What is wrong, as one of several faults of a recipe."""
        return f"the plugin {quoted(self.use)} is broken: {self.reason}"

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return "repair or reinstall the plugin; `regraft plugins` lists all of them"

    def error(self) -> PluginError:
        """The fault as the only one."""
        where = ":".join(
            str(part) for part in (self.place.file, self.place.line, self.place.column) if part is not None
        )
        message = f"{key_text(self.path)}: the plugin {quoted(self.use)} is broken"
        return PluginError(message, where=where, found=self.reason, remedy=self.remedy)


@dataclass
class StepReader:
    """Reads the steps of one document.

    Args:
        reading: collects problems.
        transformations: what can be used, by name; only those that the recipe uses are looked up.
        broken: why a plugin cannot be used, by name.
        homes: for keys that belong outside of steps, where they belong.
    """

    reading: Reading
    transformations: Transformations
    broken: Mapping[str, str]
    homes: Mapping[str, str]
    broken_uses: list[BrokenUse] = field(default_factory=list)
    _owners: dict[str, KeyPath] = field(default_factory=dict)

    def read(self) -> tuple[Step, ...]:
        """All steps that are valid."""
        raw = self.reading.document.data.get("steps", [])
        if not isinstance(raw, list):
            remedy = "write [[steps]], with two brackets, for each step" if isinstance(raw, dict) else None
            self.reading.report(("steps",), f"expected an array of tables, found {value_text(raw)}", remedy)
            return ()
        steps = [self._step(("steps", index), value) for index, value in enumerate(raw)]
        return tuple(step for step in steps if step is not None)

    def _step(self, path: KeyPath, raw: Any) -> Step | None:
        if not isinstance(raw, dict):
            self.reading.report(path, f"expected a table with `use`, found {value_text(raw)}")
            return None
        use = self._use(path, raw)
        name = self._id(path, raw, use)
        if use is None or use not in self.transformations:
            return None
        given = {key: value for key, value in raw.items() if key not in OWN_KEYS}
        params = self.reading.validated(self.transformations[use].Params, given, path, self.homes)
        if params is None or name is None:
            return None
        place = self.reading.document.place(path)
        return Step(id=name, use=use, params=params, position=Position(place.file, place.line))

    def _use(self, path: KeyPath, raw: Mapping[str, Any]) -> str | None:
        """The transformation's name if it is known, working or broken."""
        place = (*path, "use")
        if "use" not in raw:
            self._no_use(path, raw)
            return None
        use = raw["use"]
        if not isinstance(use, str):
            self.reading.report(
                place, f"expected the name of a transformation, found {value_text(use)}", self._installed()
            )
            return None
        if use in self.transformations:
            return use
        if use in self.broken:
            self.broken_uses.append(BrokenUse(self.reading.document.place(place), place, use, self.broken[use]))
            return use
        question = did_you_mean(use, [*self.transformations, *self.broken])
        remedy = " ".join(part for part in (question, self._installed()) if part)
        self.reading.report(place, f"there is no transformation {quoted(use)}", remedy)
        return None

    def _no_use(self, path: KeyPath, raw: Mapping[str, Any]) -> None:
        typo = closest("use", [key for key in raw if key != "id"])
        if typo is not None:
            self.reading.report((*path, typo), "unknown key", 'did you mean "use"?')
        else:
            message = "missing; expected the name of a transformation"
            self.reading.report((*path, "use"), message, f"add use = ...; {self._installed()}")

    def _installed(self) -> str:
        return f"installed: {listed(sorted(self.transformations)) or 'none'}"

    def _id(self, path: KeyPath, raw: Mapping[str, Any], use: str | None) -> str | None:
        """The step's id, checked to be usable and unique."""
        own = "id" in raw
        name, place = (raw["id"], (*path, "id")) if own else (use, (*path, "use"))
        if name is None:
            return None
        if not isinstance(name, str) or (own and not re.fullmatch(ID_PATTERN, name)):
            message = f"expected letters, digits, - and _, with a letter or digit first, found {value_text(name)}"
        elif name in TOP_LEVEL:
            message = f"{quoted(name)} is a top-level key, so no step can have it as its id"
        elif name in self._owners:
            message = f"the id {quoted(name)} is taken by {self._owner(name)}"
        else:
            self._owners[name] = place
            return name
        self.reading.report(place, message, "choose another id" if own else f'add an id of its own: id = "{name}-2"')
        return None

    def _owner(self, name: str) -> str:
        place = self._owners[name]
        return f"{key_text(place[:2])} in {self.reading.document.place(place)}"

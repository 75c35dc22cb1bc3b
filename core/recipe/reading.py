"""One reading of a document: validates its parts, and collects every problem and every path on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from regraft.core.errors import Problem
from regraft.core.recipe.document import Document, Place, number_problems
from regraft.core.recipe.explain import Fault, validate
from regraft.core.recipe.nodes import item_at, shape_of
from regraft.core.recipe.references import Reference, resolve
from regraft.core.recipe.wording import KeyPath, value_text

M = TypeVar("M", bound=BaseModel)


class Reading:
    """Collects what is found while a document is validated; of several problems at one place the first counts."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.references: dict[KeyPath, Reference] = {}
        self._found: dict[KeyPath, tuple[Place, Problem]] = {}
        for path, message, remedy in number_problems(document.data):
            self.report(path, message, remedy)

    def report(self, path: KeyPath, message: str, remedy: str | None = None) -> None:
        """Note a problem with the value at `path`."""
        place = self.document.place(path)
        self._found.setdefault(path, (place, place.problem(path, message, remedy)))

    def problems(self) -> list[Problem]:
        """All problems: file by file from the recipe to what it extends, by line and column, then options in order."""
        ranked = sorted(self._found.values(), key=lambda found: found[0].rank)
        return [problem for _, problem in ranked]

    def validated(self, model: type[M], data: Mapping[str, Any], start: KeyPath, homes: Mapping[str, str]) -> M | None:
        """`data`, which stands at `start`, as an instance of `model`, with its paths resolved; None if it has problems.

        Args:
            model: a pydantic model.
            data: the values.
            start: where they stand in the document.
            homes: for keys that are known elsewhere, where they belong.
        """
        resolved = resolve(self.document, start, dict(data), shape_of(model))
        for path, message, remedy in resolved.problems:
            self.report((*start, *path), message, remedy)
        self.references.update({(*start, *path): reference for path, reference in resolved.references.items()})
        instance, faults = validate(model, resolved.data, data)
        for fault in faults:
            self._explain(fault, start, homes)
        return None if resolved.problems else instance

    def _explain(self, fault: Fault, start: KeyPath, homes: Mapping[str, str]) -> None:
        path = (*start, *fault.path)
        place, remedy = self.document.place(path), _remedy(fault, start, homes)
        if fault.kind == "text" and place.option == path:
            remedy = f"quote it twice: {place.file}='\"{value_text(item_at(self.document.data, path))}\"'"
        self.report(path, fault.message, remedy)


def _remedy(fault: Fault, start: KeyPath, homes: Mapping[str, str]) -> str | None:
    suggested = fault.remedy is not None and fault.remedy.startswith("did you mean")
    inside_parameters = start and len(fault.path) > 1
    if fault.kind != "unknown" or suggested or inside_parameters:
        return fault.remedy
    return homes.get(str(fault.path[-1]), fault.remedy)

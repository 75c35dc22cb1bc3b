"""The one exception tree of regraft, and the exit codes that it maps to.

Every error says what happened, where (file, tensor or key), what was expected, what was found, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class RegraftError(Exception):
    """An error with a cause that a user can act on; the command line prints it without a traceback.

    Args:
        message: what happened, in one sentence without a full stop.
        where: the file, tensor or key concerned.
        expected: what would have been right.
        found: what was there instead.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.remedy = remedy

    def __str__(self) -> str:
        """The message and its details, a line each."""
        head = f"{self.where}: {self.message}" if self.where else self.message
        details = (("expected", self.expected), ("found", self.found), ("remedy", self.remedy))
        return "\n".join([head, *(f"  {label}: {text}" for label, text in details if text is not None)])

    def as_json(self) -> dict[str, object]:
        """The same facts as a JSON object, for `--json`."""
        fields = ("message", "where", "expected", "found", "remedy")
        facts = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return {"error": type(self).__name__, "exit_code": self.exit_code, **facts}


class TransformationError(RegraftError):
    """A transformation failed while it ran, or its patch is not what its plan said."""


class VerificationError(RegraftError):
    """A written checkpoint is not what it should be."""


class Unsupported(RegraftError):
    """A transformation cannot be applied to this checkpoint: raise it from `check`."""


class UsageError(RegraftError):
    """The command line or the recipe asks for something that cannot be."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One fault of a recipe, with the place where it stands (line and column count from 1)."""

    message: str
    key: str = ""
    file: str = ""
    line: int | None = None
    column: int | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        """`file:line:column: key: message (remedy)`, as compilers print it."""
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part not in ("", None))
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        return f"{text} ({self.remedy})" if self.remedy else text


class RecipeError(UsageError):
    """Everything that is wrong with a recipe, at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"the recipe has {count} {'error' if count == 1 else 'errors'}")

    def __str__(self) -> str:
        """The count, then a line for each fault."""
        return "\n".join([f"{self.message}:", *(f"  {problem}" for problem in self.problems)])

    def as_json(self) -> dict[str, object]:
        """The same facts as a JSON object."""
        return {**super().as_json(), "problems": [vars(problem) for problem in self.problems]}


class InputError(RegraftError):
    """A checkpoint, an adapter or a data file cannot be read or is not valid."""

    exit_code = 3


class ResourceError(RegraftError):
    """Not enough disk, memory or device; or the target cannot be written."""

    exit_code = 4


class PluginError(RegraftError):
    """A plugin is broken, asks for another API, or did what its contract forbids."""

    exit_code = 5


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]

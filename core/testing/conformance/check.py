"""What a check is, how it says that something does not hold, and how it says that it does not apply."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from regraft.core.errors import RegraftError, VerificationError

if TYPE_CHECKING:
    from regraft.core.testing.conformance.subject import Subject

Status = Literal["passed", "failed", "not applicable"]


class NotApplicable(Exception):
    """The check says nothing about this transformation; the text is the reason.

    An `example` raises it where a package that the transformation needs is not installed: then no check applies.
    """


@dataclass(frozen=True)
class Outcome:
    """What became of one check.

    Args:
        check: its name.
        status: how it ended.
        message: what does not hold, with the remedy; or why the check does not apply.
        error: the exception, if the transformation raised one that is no error of regraft's.
    """

    check: str
    status: Status
    message: str = ""
    error: Exception | None = None


@dataclass(frozen=True)
class Check:
    """One named property of a transformation."""

    function: Callable[[Subject], None]

    @property
    def name(self) -> str:
        """How reports and `without` call it."""
        return self.function.__name__

    @property
    def holds(self) -> str:
        """What holds, in one line."""
        return inspect.cleandoc(self.function.__doc__ or "").splitlines()[0]

    def run(self, subject: Subject) -> Outcome:
        """Try it on `subject`; never raises."""
        try:
            self.function(subject)
        except NotApplicable as reason:
            return Outcome(self.name, "not applicable", str(reason))
        except RegraftError as error:
            return Outcome(self.name, "failed", str(error))
        except Exception as error:
            message = (
                f"{type(error).__name__}: {error}\n  remedy: raise Unsupported or InputError from `check`, or repair"
            )
            return Outcome(self.name, "failed", f"the transformation raised {message} it", error)
        return Outcome(self.name, "passed")


def demand(holds: bool, message: str, *, remedy: str, where: object = None, expected: object = None,
           found: object = None) -> None:  # fmt: skip
    """Go on if it `holds`.

    Raises:
        VerificationError: it does not.
    """
    if not holds:
        raise VerificationError(message, where=where, expected=expected, found=found, remedy=remedy)


def named(names: object, most: int = 3) -> str:
    """The first of several names, for a message."""
    listed = sorted(map(str, names)) if not isinstance(names, str) else [names]  # type: ignore[call-overload]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")

"""The suite as a class for pytest: a test for each check."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import UsageError
from regraft.core.testing.conformance.check import Check
from regraft.core.testing.conformance.subject import USUAL_NEIGHBOURS, Subject
from regraft.core.testing.conformance.suite import CHECKS
from regraft.core.transformation import AnyTransformation


class Conformance:
    """Derive a class whose name begins with `Test` and set `transformation`; pytest then runs every check on it.

    Attributes:
        transformation: the class under test, importable by its module and name.
        params: parameters as a recipe writes them; None takes those of `transformation.example`. Override `parameters`
            where they depend on the base, or name files.
        families: model families that it must work on; empty for those of the usual ones that it does not refuse.
        neighbours: first-party steps before and behind which it is tried.
        without: checks that do not apply, each with the reason, which is shown.
    """

    transformation: ClassVar[type[AnyTransformation]]
    params: ClassVar[Mapping[str, Any] | None] = None
    families: ClassVar[Sequence[str]] = ()
    neighbours: ClassVar[Sequence[str]] = USUAL_NEIGHBOURS
    without: ClassVar[Mapping[str, str]] = MappingProxyType({})
    _subject: ClassVar[Subject | None] = None
    _folder: ClassVar[tempfile.TemporaryDirectory[str] | None] = None

    @classmethod
    def parameters(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """The parameters for a base; files that they name are written into `folder`."""
        return cls.transformation.example(checkpoint, folder) if cls.params is None else cls.params

    @classmethod
    def subject(cls) -> Subject:
        """What the checks look at; made once for the class."""
        if cls._subject is None:
            cls._folder = tempfile.TemporaryDirectory(prefix="regraft-conformance-")
            cls._subject = Subject(
                cls.transformation,
                Path(cls._folder.name),
                params=cls.parameters,
                families=cls.families,
                neighbours=cls.neighbours,
            )
        return cls._subject

    @classmethod
    def teardown_class(cls) -> None:
        """Remove what the checks have written."""
        if cls._folder is not None:
            cls._folder.cleanup()
        cls._folder = cls._subject = None


def _test_of(check: Check) -> Callable[[Conformance], None]:
    def test(self: Conformance) -> None:
        pytest = _pytest()
        if reason := self.without.get(check.name):
            pytest.skip(reason)
        outcome = check.run(self.subject())
        if outcome.status == "not applicable":
            pytest.skip(outcome.message)
        if outcome.error is not None:
            outcome.error.add_note(outcome.message)
            raise outcome.error
        if outcome.status == "failed":
            pytest.fail(f"{check.name}: {check.holds}\n{outcome.message}", pytrace=False)

    test.__doc__ = check.holds
    test.__name__ = f"test_{check.name}"
    return test


def _pytest() -> Any:
    """pytest, which only people who test plugins need.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import pytest
    except ImportError:
        raise UsageError(
            "the conformance suite as a class needs pytest, which is not installed",
            where="regraft.testing.Conformance",
            remedy="pip install pytest, or run `regraft plugins check PACKAGE`",
        ) from None
    return pytest


for _check in CHECKS:
    setattr(Conformance, f"test_{_check.name}", _test_of(_check))

"""The suite as a class for pytest: what becomes a failure, a skip and an error."""

import sys

import pytest

from regraft.core.errors import UsageError
from regraft.core.testing.conformance.for_pytest import Conformance
from regraft.core.testing.conformance.suite import CHECKS
from tests.core.testing import broken


class _Undescribed(Conformance):
    transformation = broken.Undescribed
    families = ("llama",)
    without = {"refuses_unknown_parameters": "it is only a test"}  # noqa: RUF012


class _Lookup(Conformance):
    transformation = broken.Lookup
    families = ("llama",)


@pytest.fixture(autouse=True)
def cleaned():
    yield
    for kind in (_Undescribed, _Lookup):
        kind.teardown_class()


def test_there_is_a_test_for_every_check_with_what_holds():
    for check in CHECKS:
        assert getattr(Conformance, f"test_{check.name}").__doc__ == check.holds


def test_what_does_not_hold_fails_with_the_remedy():
    with pytest.raises(pytest.fail.Exception, match=r"(?s)describes_itself: It has a name.*remedy: give Field"):
        _Undescribed().test_describes_itself()
    _Undescribed().test_plan_is_repeatable()


def test_a_check_that_is_left_out_is_skipped_with_the_reason():
    with pytest.raises(pytest.skip.Exception, match="it is only a test"):
        _Undescribed().test_refuses_unknown_parameters()


def test_an_exception_of_the_transformation_is_raised_as_it_is_with_a_note():
    with pytest.raises(KeyError) as caught:
        _Lookup().test_refuses_unknown_architectures()
    assert "raise Unsupported" in caught.value.__notes__[0]


def test_what_the_checks_have_written_is_removed():
    folder = _Undescribed.subject().folder
    assert folder.is_dir()
    _Undescribed.teardown_class()
    assert not folder.exists()
    assert _Undescribed._subject is None


def test_without_pytest_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(UsageError, match="needs pytest") as caught:
        _Undescribed().test_describes_itself()
    assert "regraft plugins check" in caught.value.remedy

"""Data files that many tests read."""

import pytest

from tests.plugins.lofit.support import rows, write_rows


@pytest.fixture
def answers(tmp_path):
    """16 prompts with completions."""
    return write_rows(tmp_path / "answers.jsonl", rows())


@pytest.fixture
def preferences(tmp_path):
    """16 preference pairs."""
    return write_rows(tmp_path / "preferences.jsonl", rows(pairs=True))


@pytest.fixture
def plots():
    """For tests that want the plots drawn."""


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request):
    """No plots, which take most of a small step's time, but where a test asks for them."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("regraft.core.training.report.loss_curve", lambda *args, **options: b"curve")
        monkeypatch.setattr("regraft.plugins.lofit.report.heat_map", lambda *args, **options: b"map")

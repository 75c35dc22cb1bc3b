"""Places to work in that the tests of several files share: a target that is not there yet, and an empty step cache."""

from pathlib import Path

import pytest

from regraft.core.cache_folder import CacheFolder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "model"


@pytest.fixture
def cache(workplace, monkeypatch):
    """An empty cache in the current folder; nothing has run yet."""
    from tests.core.learning import RAN

    monkeypatch.setenv("REGRAFT_CACHE", "cache")
    monkeypatch.delenv("REGRAFT_CACHE_SIZE")
    RAN.clear()
    return CacheFolder(Path("cache"))

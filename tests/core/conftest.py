"""Places to work in that the tests of several files share: a target that is not there yet."""

import pytest


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "model"

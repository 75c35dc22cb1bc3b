"""A text file that the tests train on."""

from pathlib import Path

import pytest

from tests.plugins.hyperfitting.support import sentences


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(sentences(12))
    return path

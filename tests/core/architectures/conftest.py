"""Tiny checkpoints as transformers writes them, made once for all tests of this folder."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.core.architectures.saved import Saved, write
from tests.families import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    @cache
    def make(name: str) -> Saved:
        return write(tiny(name), tmp_path_factory.mktemp("tiny"))

    return make

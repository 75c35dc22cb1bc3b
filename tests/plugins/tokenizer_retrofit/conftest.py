"""A folder with a corpus, in which the tests of one file make their checkpoints."""

import pytest

from tests.plugins.tokenizer_retrofit import toys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    (root / "corpus.txt").write_text(toys.DUTCH)
    return root

"""Whether the library of the index is there; without importing it, or torch."""

from __future__ import annotations

from importlib.util import find_spec

from regraft.core.errors import UsageError


def check_library() -> None:
    """Whether faiss is installed.

    Raises:
        UsageError: it is not.
    """
    if find_spec("faiss") is None:
        raise UsageError("searching a large vocabulary needs faiss, which is not installed", where="large-vocabulary",
                         expected="the package faiss-cpu", remedy="pip install 'regraft[faiss]'")  # fmt: skip

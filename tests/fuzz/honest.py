"""Honest files to begin with: a tiny checkpoint that nothing changes, and a folder to write what is fuzzed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


@cache
def scratch() -> Path:
    """A folder that ends with the process, with honest files in it: see `base`."""
    folder = tempfile.TemporaryDirectory(prefix="regraft-fuzz-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[Any] = []


@cache
def base() -> Path:
    """A tiny checkpoint with a tokenizer, in shards, that nothing changes."""
    from tests.families import save_tiny

    return save_tiny("llama", scratch() / "base", shards="150KB", tokenizer=True)


@cache
def variant(name: str, *links: str) -> Path:
    """A folder with links to some files of the base, for one file that is fuzzed beside them."""
    folder = scratch() / name
    folder.mkdir()
    for file in base().iterdir():
        if not links or file.suffix in links:
            (folder / file.name).symlink_to(file)
    return folder


def put(path: Path, data: bytes) -> Path:
    """Write `data` in place of the file or link `path`."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def of_base(name: str) -> Callable[[], list[bytes]]:
    """The base's own file as a seed."""
    return lambda: [(base() / name).read_bytes()]


def document(value: Any) -> bytes:
    return json.dumps(value).encode()

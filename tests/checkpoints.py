"""Small safetensors checkpoints: those of `regraft.testing`, and files written byte by byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from regraft.core.testing.checkpoints import CONFIG, INDEX, SINGLE, bits, read_tensors, same_bits, write_checkpoint

__all__ = ["CONFIG", "INDEX", "SINGLE", "bits", "entry", "file_bytes", "read_all", "same_bits", "write_checkpoint"]

read_all = read_tensors


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of `header` (JSON value, or the very bytes) and `data`, whatever they say of each other."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: Sequence[Any], begin: Any, end: Any) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}

"""GGUF files byte by byte, so that a test can lie about anything."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

U8, BOOL, STRING, ARRAY, U32 = 0, 7, 8, 9, 4
F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def entry(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int, *, dimensions: int | None = None) -> bytes:
    """A tensor's entry; `dims` fastest first, as the format has it."""
    count = len(dims) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(dims)}Q", count, *dims) + struct.pack("<IQ", kind, offset)


@dataclass
class Binary:
    """A file in parts; the counts are those of the parts unless a test says otherwise."""

    magic: bytes = b"GGUF"
    version: bytes = field(default_factory=lambda: u32(3))
    pairs: list[bytes] = field(default_factory=lambda: [pair("general.architecture", STRING, text("llama"))])
    entries: list[bytes] = field(default_factory=lambda: [entry("a", (8, 2), F32, 0), entry("b", (32, 1), Q8_0, 64)])
    data: bytes = bytes(64 + 34)
    pair_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32

    def __bytes__(self) -> bytes:
        counts = (len(self.entries) if self.tensor_count is None else self.tensor_count,
                  len(self.pairs) if self.pair_count is None else self.pair_count)  # fmt: skip
        head = self.magic + self.version + struct.pack("<2Q", *counts) + b"".join(self.pairs) + b"".join(self.entries)
        return head + bytes(-len(head) % self.alignment) + self.data

    def write(self, folder: Path) -> Path:
        path = folder / "model.gguf"
        path.write_bytes(bytes(self))
        return path

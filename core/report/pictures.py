"""Pictures as data URIs."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass

TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
    ".svg": "image/svg+xml",
}  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Args:
        name: in words.
        alt: what it is, for those who do not see it.
        uri: the picture itself.
        width, height: in pixels; None where its header does not tell.
    """

    name: str
    alt: str
    uri: str
    width: int | None = None
    height: int | None = None


def picture(name: str, data: bytes, suffix: str, *, alt: str) -> Picture:
    """A picture out of a file's bytes; `suffix` is one of `TYPES`."""
    uri = f"data:{TYPES[suffix]};base64,{base64.b64encode(data).decode()}"
    if is_png(data):
        width, height = struct.unpack(">II", data[16:24])
        return Picture(name, alt, uri, width, height)
    return Picture(name, alt, uri)


def is_png(data: bytes) -> bool:
    """Whether the bytes begin as a PNG file does."""
    return data.startswith(_PNG) and len(data) >= 24

"""Reading the binary parts of a GGUF header in order, each size checked before anything is allocated for it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from regraft.core.errors import InputError

REDOWNLOAD = "the file is damaged or incomplete: fetch it again"

MAX_HEADER_BYTES = 64 << 20
"""No honest header comes near (a vocabulary of 262 thousand tokens takes 15 MB); what does is refused unread."""

_WINDOW_BYTES = 1 << 20
_U64 = struct.Struct("<Q")


class Cursor:
    """A position in a file of which everything before it has been parsed.

    Args:
        file: open for reading, at its start.
        file_bytes: its size.
        path: how messages name it.
    """

    def __init__(self, file: BinaryIO, file_bytes: int, path: object) -> None:
        self._file = file
        self._file_bytes = file_bytes
        self._path = path
        self._window = b""
        self._window_start = 0
        self._at = 0

    @property
    def offset(self) -> int:
        """Bytes from the start of the file."""
        return self._window_start + self._at

    @property
    def remaining(self) -> int:
        """Bytes that the header can still have."""
        return max(0, min(self._file_bytes, MAX_HEADER_BYTES) - self.offset)

    def take(self, nbytes: int, what: str) -> bytes:
        """The next `nbytes` bytes.

        Raises:
            InputError: the file has fewer; `what` says what should have stood there.
        """
        if self._at + nbytes > len(self._window):
            self._refill(nbytes, what)
        start = self._at
        self._at += nbytes
        return self._window[start : self._at]

    def number(self, layout: struct.Struct, what: str) -> Any:
        """One number of the given layout."""
        return layout.unpack(self.take(layout.size, what))[0]

    def text(self, what: str) -> str:
        """One string: its length in 8 bytes, then UTF-8.

        Raises:
            InputError: the file is shorter than the length says, or the bytes are not UTF-8.
        """
        data = self.take(self.number(_U64, what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} is not UTF-8 text", found=data[:40]) from None

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings. The loop stays inside the window for speed: vocabularies have hundreds of thousands."""
        result: list[str] = []
        unpack = _U64.unpack_from
        while len(result) < count:
            window, at, last = self._window, self._at, len(self._window) - 8
            try:
                while len(result) < count and at <= last:
                    end = at + 8 + unpack(window, at)[0]
                    if end > len(window):
                        break
                    result.append(window[at + 8 : end].decode("utf-8"))
                    at = end
            except UnicodeDecodeError:
                raise self.fault(f"{what} is not UTF-8 text", found=f"element {len(result)}") from None
            self._at = at
            if len(result) < count:
                result.append(self.text(what))
        return result

    def claim(self, count: int, each: int, what: str) -> None:
        """Check that `count` items of at least `each` bytes can still stand in the file.

        Raises:
            InputError: they cannot, so the count is a lie.
        """
        if count * each > self.remaining:
            raise self.fault(
                f"the header announces more {what} than the file can hold",
                expected=f"at most {self.remaining // each}",
                found=count,
            )

    def fault(self, message: str, *, expected: object = None, found: object = None) -> InputError:
        """An error about this file."""
        return InputError(message, where=self._path, expected=expected, found=found, remedy=REDOWNLOAD)

    def _refill(self, nbytes: int, what: str) -> None:
        end = self.offset + nbytes
        if end > self._file_bytes:
            raise self.fault(
                f"is truncated inside its header, in {what}",
                expected=f"{end} bytes or more",
                found=f"{self._file_bytes} bytes",
            )
        if end > MAX_HEADER_BYTES:
            raise self.fault(
                f"the header is too large, in {what}", expected=f"at most {MAX_HEADER_BYTES} bytes", found=end
            )
        rest = self._window[self._at :]
        self._window_start, self._at = self.offset, 0
        self._window = rest + self._file.read(max(nbytes - len(rest), _WINDOW_BYTES))
        if len(self._window) < nbytes:
            raise self.fault(
                "the file ended while it was read", expected=f"{nbytes} bytes", found=f"{len(self._window)} bytes"
            )


Fault = Callable[..., InputError]
"""Makes an error about one file: called with a message, and `expected` and `found` by name."""

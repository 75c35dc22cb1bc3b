"""stdout and stderr that may be cut off: the command goes on, and ends with the code that it would have had."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from regraft.core.errors import ResourceError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Stream(io.FileIO):
    """Below the buffers of stdout or stderr: what cannot be written any more goes nowhere, and `cut_off` says so.

    Buffers keep what they failed to write, and Python tries it once more when it ends, so one failure decides.
    """

    def __init__(self, descriptor: int, *, result: bool) -> None:
        """Write to `descriptor`, which stays open; `result`: losing something of it is an error."""
        super().__init__(descriptor, "w", closefd=False)
        self._result = result
        self.cut_off = False

    def write(self, data: ReadableBuffer, /) -> int:
        """As of a file.

        Raises:
            ResourceError: there is no room for a part of the result. A reader that has seen enough is no error.
        """
        if not self.cut_off:
            try:
                return super().write(data)
            except OSError as error:
                self.cut_off = True
                if self._result and not isinstance(error, BrokenPipeError):
                    raise ResourceError(
                        f"the output cannot be printed: {error.strerror}", where="stdout",
                        remedy="send it where there is room; files that the command wrote are in place",
                    ) from None  # fmt: skip
        return memoryview(data).nbytes


def settle_streams() -> None:
    """From now on nobody who reads our output decides how the command ends; closed streams take everything, and what an
    encoding lacks (a letter, or a byte of a path that is not UTF-8) is escaped.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = _over(sys.stdout, result=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _over(sys.stderr, result=False)


def unread() -> bool:
    """Whether whoever read stdout has left: more of it is of no use to anybody."""
    below = getattr(sys.stdout, "buffer", None)
    raw = getattr(below, "raw", below)
    return isinstance(raw, _Stream) and raw.cut_off


def _over(stream: TextIO | None, *, result: bool) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # None where the descriptor is closed: `print` would take stdout
        return Path(os.devnull).open("w", encoding="utf-8")
    stream.flush()
    raw = _Stream(stream.fileno(), result=result)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )

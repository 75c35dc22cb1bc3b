"""A weight file that is being written, and what the operating system says when it cannot be."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regraft.core.buffers import write_all
from regraft.core.errors import ResourceError
from regraft.core.layout import Shard
from regraft.core.transfer import preallocate


class OutputFile:
    """Opened for its first tensor, flushed and closed after its last one, so that few files are open at a time.

    Args:
        path: must not exist.
        shard: what it will hold.
        durable: flush it to the disk.
    """

    def __init__(self, path: Path, shard: Shard, *, durable: bool) -> None:
        self._path = path
        self._shard = shard
        self._durable = durable
        self._left = len(shard.tensors)
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def open(self) -> int:
        """Its descriptor; the first call makes the file, reserves its size and writes its header."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = create(self._path)
                preallocate(self._descriptor, self._shard.nbytes)
                write_all(self._descriptor, self._shard.header, 0)
            return self._descriptor

    def done(self) -> None:
        """One more of its tensors is written."""
        with self._lock:
            self._left -= 1
            last = self._left <= 0
        if last:
            descriptor = self.open()
            if self._durable:
                os.fsync(descriptor)
            self.close()

    def close(self) -> None:
        """Close it, whatever its state."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None


def create(path: Path) -> int:
    """A descriptor of the new file `path`, with the rights that the umask leaves."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def link(source: Path, path: Path) -> None:
    """Make `path` another name of the file `source`.

    Raises:
        ResourceError: the file system cannot.
    """
    try:
        os.link(source.resolve(), path)
    except OSError as error:
        raise ResourceError(
            f"cannot be linked: {error.strerror}",
            where=path,
            expected="base and target on one file system",
            remedy="run without --link",
        ) from None


@contextmanager
def creating(path: Path) -> Iterator[int]:
    """A descriptor of the new file `path` for the time of a `with` block."""
    descriptor = create(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def resources(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of the work folder `folder` into words.

    Raises:
        ResourceError: the disk is full, or the target cannot be written.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free some space, or choose another [output] path" if full else "check the target's file system and rights"
        )
        raise ResourceError(
            "the disk is full" if full else f"cannot be written: {error.strerror}",
            where=folder.parent.parent,
            remedy=remedy,
        ) from None

"""Moving bytes between files as fast as the kernel allows, hashing them on the way when a digest is wanted."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from typing import Protocol

from regraft.core.buffers import CHUNK_BYTES, PAGE_BYTES, ended_early, unreadable, write_all

_FICLONE = 0x40049409
_KERNEL_PIECE = 64 << 20
_CANNOT_CLONE = {errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY, errno.ENOSYS, errno.EPERM}


class Hasher(Protocol):
    """The part of hashlib that is used."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes."""
        ...

    def hexdigest(self) -> str:
        """The digest so far."""
        ...


class _NoHasher:
    def update(self, data: bytes | memoryview, /) -> None:
        """Ignore them."""

    def hexdigest(self) -> str:
        """Nothing."""
        return ""


def new_hasher(algorithm: str) -> Hasher:
    """A hasher for `xxh3` (XXH3, 128 bits), `sha256`, or `none`."""
    if algorithm == "xxh3":
        import xxhash

        return xxhash.xxh3_128()
    return hashlib.sha256() if algorithm == "sha256" else _NoHasher()


def labelled(algorithm: str, hasher: Hasher) -> str | None:
    """`xxh3:...`; None where no digest is taken."""
    return None if algorithm == "none" else f"{algorithm}:{hasher.hexdigest()}"


def clone_file(source: int, target: int) -> bool:
    """Share the blocks of `source` with the empty file `target`, where the file system can."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def preallocate(descriptor: int, nbytes: int) -> None:
    """Reserve `nbytes` for an empty file, so that a full disk shows at once; only set its size where that cannot be."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, nbytes)


def copy_range(
    source: int,
    target: int,
    source_offset: int,
    target_offset: int,
    nbytes: int,
    hasher: Hasher | None = None,
    *,
    where: object = None,
) -> None:
    """Copy bytes from one open file to another; through user space only if `hasher` wants to see them.

    Args:
        source, target: open files.
        source_offset, target_offset, nbytes: what goes where.
        hasher: sees every byte.
        where: how an error names the source.

    Raises:
        InputError: the source ends early or cannot be read.
        OSError: the target cannot be written.
    """
    if hasher is not None:
        _copy_hashing(source, target, source_offset, target_offset, nbytes, hasher, where)
        return
    done = 0
    while done < nbytes:
        try:
            count = os.copy_file_range(
                source, target, min(nbytes - done, _KERNEL_PIECE), source_offset + done, target_offset + done
            )
        except OSError as error:
            if error.errno not in _CANNOT_CLONE:
                raise
            _copy_hashing(source, target, source_offset + done, target_offset + done, nbytes - done, _NoHasher(), where)
            return
        if count == 0:
            raise ended_early(where, nbytes, source_offset, done)
        done += count


def _copy_hashing(
    source: int, target: int, source_offset: int, target_offset: int, nbytes: int, hasher: Hasher, where: object
) -> None:
    phase = _phase(source_offset, target_offset)

    def write(piece: memoryview, position: int) -> None:
        hasher.update(piece)
        write_all(target, piece, target_offset + position)

    _each_piece(source, source_offset, nbytes, phase, write, where)


def hash_range(source: int, offset: int, nbytes: int, hasher: Hasher, *, where: object = None) -> None:
    """Hash bytes of an open file; `where` is how an error names it.

    Raises:
        InputError: the file ends early or cannot be read.
    """
    _each_piece(source, offset, nbytes, offset % PAGE_BYTES, lambda piece, position: hasher.update(piece), where)


def _each_piece(
    source: int, offset: int, nbytes: int, phase: int, use: Callable[[memoryview, int], None], where: object
) -> None:
    with (
        mmap.mmap(-1, CHUNK_BYTES + PAGE_BYTES) as pages,
        memoryview(pages) as whole,
        whole[phase : phase + CHUNK_BYTES] as buffer,
    ):
        done = 0
        while done < nbytes:
            with buffer[: min(CHUNK_BYTES, nbytes - done)] as wanted:
                try:
                    count = os.preadv(source, [wanted], offset + done)
                except OSError as error:
                    raise unreadable(where, error) from None
                if count == 0:
                    raise ended_early(where, nbytes, offset, done)
                with wanted[:count] as piece:
                    use(piece, done)
            done += count


def _phase(source_offset: int, target_offset: int) -> int:
    """The buffer's address modulo a page that keeps both copies out of the slow zone (see buffers.py)."""
    distance = (source_offset - target_offset) % PAGE_BYTES
    near = 0 < distance < 64 or distance > PAGE_BYTES - 64
    return (target_offset + (PAGE_BYTES // 2 if near else 0)) % PAGE_BYTES

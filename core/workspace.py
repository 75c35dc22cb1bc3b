"""The work folder beside a target, and the one rename that makes the target appear.

The target is absent (or what it was) or complete at every instant. Whatever a killed run leaves stands in the work
folder `.NAME.regraft`, which the next run into the same target takes over.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from regraft.core.errors import ResourceError, UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True)
class Workspace:
    """A locked work folder. `output` becomes the target on `commit`; `cache` is for steps."""

    target: Path
    folder: Path

    @property
    def output(self) -> Path:
        """Where the output is written."""
        return self.folder / "output"

    @property
    def cache(self) -> Path:
        """Where steps keep intermediate files."""
        return self.folder / "cache"

    def commit(self, *, durable: bool) -> None:
        """Make the output the target, in one rename.

        Raises:
            ResourceError: the file system refuses.
        """
        if durable:
            _sync_folder(self.output)
        try:
            if self.target.is_dir() and any(self.target.iterdir()):
                _exchange(self.output, self.target, self.folder / "replaced")
            else:
                self.output.rename(self.target)
        except OSError as error:
            raise ResourceError(
                f"cannot be put in place: {error.strerror}", where=self.target, remedy="check the rights of its folder"
            ) from None
        if durable:
            _sync_folder(self.target.parent)


def check_target(target: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse a target that may not be written. Looks only; changes nothing.

    Raises:
        UsageError: it is a file, it is not empty and `force` is not given, or it is, holds or stands in an input.
        ResourceError: its folder cannot be written.
    """
    resolved = target.resolve()
    for path in inputs:
        source = path.resolve()
        if source == resolved:
            raise UsageError(
                "the target is an input of the recipe", where=target, remedy="choose another [output] path"
            )
        if source.is_dir() and resolved.is_relative_to(source):
            raise UsageError(
                "the target stands inside an input of the recipe",
                where=target,
                found=f"input {path}",
                remedy="choose an [output] path outside it",
            )
        if source.is_relative_to(resolved):
            raise UsageError(
                "an input of the recipe stands inside the target",
                where=target,
                found=f"input {path}",
                remedy="choose another [output] path",
            )
    if resolved.exists() and not resolved.is_dir():
        raise UsageError(
            "the target is a file",
            where=target,
            expected="a folder that is new or empty",
            remedy="choose another [output] path",
        )
    if resolved.is_dir() and not force and any(resolved.iterdir()):
        raise UsageError(
            "the target is not empty",
            where=target,
            expected="a folder that is new or empty",
            remedy="choose another [output] path, or replace it whole with --force",
        )
    parent = next(folder for folder in resolved.parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(
            "the target's folder cannot be written",
            where=target,
            found=f"{parent} is read-only",
            remedy="choose another [output] path, or change its rights",
        )


@contextmanager
def workspace(target: Path) -> Iterator[Workspace]:
    """Lock and clear the work folder of `target`; remove it in the end, however the end comes.

    Raises:
        ResourceError: another run writes this target, or the folder cannot be made.
    """
    resolved = target.resolve()
    space = Workspace(resolved, resolved.parent / f".{resolved.name}.regraft")
    new_parents = [folder for folder in resolved.parents if not folder.exists()]
    descriptor = _open_locked(space.folder, target)
    try:
        _clear(space)
        space.output.mkdir()
        space.cache.mkdir()
        yield space
    finally:
        shutil.rmtree(space.folder, ignore_errors=True)
        os.close(descriptor)
        if not resolved.exists():
            _remove_empty(new_parents)


def _open_locked(folder: Path, target: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ResourceError(
            f"the work folder cannot be made: {error.strerror}", where=target, remedy="check the rights of its folder"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(descriptor).st_nlink > 0  # 0: the run that held it has just removed it
    except BlockingIOError:
        free = False
    if not free:
        os.close(descriptor)
        raise ResourceError(
            "another run is writing this target",
            where=target,
            found=f"{folder.name} is locked",
            remedy="wait until it ends, or choose another [output] path",
        )
    return descriptor


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _clear(space: Workspace) -> None:
    """Take over what a killed run left: a target that it was replacing goes back, the rest goes away."""
    replaced = space.folder / "replaced"
    if replaced.exists() and not space.target.exists():
        replaced.rename(space.target)
    for path in space.folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _exchange(output: Path, target: Path, replaced: Path) -> None:
    """Swap two folders in one instant where the kernel can; else with two renames, the target absent in between."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(output), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    target.rename(replaced)
    output.rename(target)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

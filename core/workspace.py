"""The work folder beside a target, and the one rename that makes the target appear.

The target is absent (or what it was) or complete at every instant. Whatever a killed run leaves stands in the work
folder `.NAME.regraft`, which the next run into the same target takes over. Of all that, only `state` is of use to it:
there steps keep what lets them go on, and it stays until a target stands.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from regraft.core.checkpoint import ADAPTER_CONFIG, CONFIG
from regraft.core.errors import ResourceError, UsageError
from regraft.core.interrupts import unbroken

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""Step ids that can be names of folders."""
_NEW = "a folder that is new or empty"


@dataclass(frozen=True)
class Workspace:
    """A locked work folder. `output` becomes the target on `commit`; `cache` and `state` are for steps.

    Args:
        target: where the output goes, resolved.
        folder: the work folder.
        replaces: whether the target held something when the run began, so that it may be replaced.
    """

    target: Path
    folder: Path
    replaces: bool = False

    @property
    def output(self) -> Path:
        """Where the output is written."""
        return self.folder / "output"

    @property
    def cache(self) -> Path:
        """Where steps keep intermediate files."""
        return self.folder / "cache"

    @property
    def state(self) -> Path:
        """Where steps keep what lets them go on after a run that did not reach its end; they make it."""
        return self.folder / "state"

    def state_of(self, step: str) -> Path:
        """A step's own folder in `state`, whatever characters its id holds."""
        name = step if _PLAIN.fullmatch(step) else f"_{hashlib.sha256(step.encode()).hexdigest()[:32]}"
        return self.state / name

    @property
    def keeps_state(self) -> bool:
        """Whether there is anything to go on from."""
        return not self.state.is_symlink() and any(path.is_file() for path in self.state.rglob("*"))

    @property
    def replaced(self) -> Path:
        """Where the old target waits between two renames, on file systems that cannot exchange."""
        return self.folder / "replaced"

    def commit(self, *, durable: bool) -> None:
        """Make the output the target, in one rename.

        Raises:
            ResourceError: the file system refuses, or a target that was absent or empty has been filled meanwhile.
        """
        try:
            if durable:
                _sync_tree(self.output)
            if self.replaces and _holds_something(self.target):
                _exchange(self.output, self.target, self.replaced)
            else:
                self.output.rename(self.target)
            shutil.rmtree(self.state, ignore_errors=True)
            if durable:
                _sync(self.target.parent)
        except OSError as error:
            filled = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            raise ResourceError(
                f"cannot be put in place: {error.strerror}",
                where=self.target,
                remedy="something else has written the target meanwhile: look at it, then use --force or another path"
                if filled
                else "check the rights of its folder",
            ) from None


def check_target(target: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse a target that may not be written. Looks only; changes nothing.

    Raises:
        UsageError: it is no path, or a file, it is not empty and `force` is not given, or it is, holds or stands in an
            input.
        ResourceError: its folder cannot be written.
    """
    resolved = _resolved(target)
    for path in inputs:
        _check_against_input(target, resolved, path)
    try:
        _check_place(target, resolved, force)
    except OSError as error:
        raise ResourceError(
            f"the target cannot be looked at: {error.strerror}",
            where=target,
            remedy="choose another [output] path, or change the rights of its folder",
        ) from None


def _resolved(target: Path) -> Path:
    try:
        resolved = target.resolve()
        _refuse_loop(resolved)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            "the target is not a path", where=ascii(str(target)), found=error, remedy="choose another [output] path"
        ) from None
    return resolved


def _refuse_loop(path: Path) -> None:
    """Links that lead to themselves: since Python 3.13 `resolve` leaves them as they are."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise


def _check_against_input(target: Path, resolved: Path, path: Path) -> None:
    source = path.resolve()
    if source == resolved:
        raise UsageError("the target is an input of the recipe", where=target, remedy="choose another [output] path")
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


def _check_place(target: Path, resolved: Path, force: bool) -> None:
    if resolved.parent == resolved:
        raise UsageError(
            "the target is the root of the file system", where=target, expected=_NEW, remedy="choose a folder in it"
        )
    if resolved.exists() and not resolved.is_dir():
        raise UsageError("the target is a file", where=target, expected=_NEW, remedy="choose another [output] path")
    if not force:
        _refuse_full(target, resolved)
    known = any((resolved / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))
    if force and _holds_something(resolved) and not known:
        raise UsageError(
            "the target is no checkpoint, and --force replaces nothing else",
            where=target,
            expected=f"a folder with {CONFIG} or {ADAPTER_CONFIG}, or one that is new or empty",
            remedy="choose another [output] path, or empty the folder yourself",
        )
    parent = next(folder for folder in resolved.parents if folder.exists())
    if not parent.is_dir():
        raise UsageError(
            "the target stands inside a file", where=target, found=parent, remedy="choose another [output] path"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(
            "the target's folder cannot be written",
            where=target,
            found=f"{parent} is read-only",
            remedy="choose another [output] path, or change its rights",
        )


def _refuse_full(target: Path, resolved: Path) -> None:
    if _holds_something(resolved) or (not resolved.exists() and _holds_something(work_folder(resolved).replaced)):
        raise UsageError(
            "the target is not empty",
            where=target,
            expected=_NEW,
            remedy="choose another [output] path, or replace it whole with --force",
        )


@contextmanager
def workspace(target: Path, *, force: bool = False, restart: bool = False) -> Iterator[Workspace]:
    """Lock and clear the work folder of `target`; remove it in the end, however the end comes.

    The state that steps have saved there is kept, until a target stands.

    Args:
        target: where the output will go.
        force: replace a non-empty target.
        restart: forget the state, too.

    Raises:
        UsageError: the target is no path, or another run has filled it since it was looked at.
        ResourceError: another run writes this target, or the folder cannot be made.
    """
    space = work_folder(target)
    resolved = space.target
    new_parents = [folder for folder in resolved.parents if not folder.exists()]
    try:
        descriptor = _open_locked(space.folder, target)
        try:
            with _making(target):
                if not force:
                    _refuse_full(target, resolved)  # again: another run may have held the lock until now
                _clear(space, keep_state=not restart)
                space.output.mkdir()
                space.cache.mkdir()
                space = Workspace(resolved, space.folder, replaces=_holds_something(resolved))
            yield space
        finally:
            with unbroken():
                _remove(space)
                os.close(descriptor)
    finally:
        if not resolved.exists():
            _remove_empty(new_parents)


def work_folder(target: Path) -> Workspace:
    """That of `target`, whoever has locked it.

    Raises:
        UsageError: the target is no path.
    """
    resolved = _resolved(target)
    return Workspace(resolved, resolved.parent / f".{resolved.name}.regraft")


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def _making(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"the work folder cannot be made: {error.strerror}", where=target, remedy="check the rights of its folder"
        ) from None


def _open_locked(folder: Path, target: Path) -> int:
    with _making(target):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(descriptor).st_nlink > 0  # 0: the run that held it has just removed it
    except OSError:
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


def _put_back(space: Workspace) -> None:
    """A target that a run was replacing goes back, if nothing has come in its place."""
    if space.replaced.exists() and not space.target.exists():
        space.replaced.rename(space.target)


def _clear(space: Workspace, *, keep_state: bool) -> None:
    """Take over what a killed run left: a target that it was replacing goes back, the rest but the state goes away."""
    _put_back(space)
    keep_state = keep_state and space.keeps_state
    for path in space.folder.iterdir():
        if keep_state and path == space.state:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(space: Workspace) -> None:
    """Remove the work folder, or all but the state in it; all of it stays where an old target cannot be put back."""
    with suppress(OSError):
        _put_back(space)
        with suppress(OSError):  # another process may still be making files in it: that fails from here on
            space.output.rename(space.folder / "removed")
        if space.keeps_state:
            _clear(space, keep_state=True)
        else:
            shutil.rmtree(space.folder, ignore_errors=True)


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


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder: the target must not appear before its contents are on the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

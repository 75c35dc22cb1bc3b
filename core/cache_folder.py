"""The folder that keeps results of steps from run to run: where it is, how large it may grow, and who uses an entry.

`STEPS/KEY` is an entry, complete or not there at all: it is written aside and renamed. Whoever reads an entry holds a
shared lock on its folder, whoever removes one an exclusive lock, so that two runs at once do each other no harm. The
time of an entry's folder says when it was last used. Whatever has another name than ours is somebody else's, and stays:
`REGRAFT_CACHE` may name a folder that has `steps` or `weights` of its own.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from regraft.core.errors import ResourceError, UsageError
from regraft.core.recipe.model import size_bytes

FOLDER, SIZE = "REGRAFT_CACHE", "REGRAFT_CACHE_SIZE"
"""Environment variables: the folder, and the most bytes that it may hold; 0 turns the cache off."""

DEFAULT_BYTES = 20 * 10**9
_ASIDE = "."
"""First letter of what is no entry: one that is being written, or removed."""
_ENTRY = re.compile(r"[0-9a-f]{64}")
_HALF = re.compile(re.escape(_ASIDE) + r"[0-9a-f]+[.0-9]*")


class Held:
    """A shared lock on an entry, until this is dropped."""

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)


@dataclass(frozen=True)
class CacheFolder:
    """The cache.

    Args:
        path: its folder, which need not exist.
        limit: bytes that it may hold.
    """

    path: Path
    limit: int = DEFAULT_BYTES

    @property
    def steps(self) -> Path:
        """Where entries stand, by key."""
        return self.path / "steps"

    @property
    def weights(self) -> Path:
        """Where digests of weight files stand that need not be read again."""
        return self.path / "weights"

    def entries(self) -> list[str]:
        """The keys of all entries, the one that was used last first."""
        return [path.name for _, path in sorted(self._entries(), reverse=True)]

    def entry(self, key: str) -> Path:
        """Where the entry `key` stands, if there is one."""
        return self.steps / key

    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(tree_bytes(path) for _, path in self._entries())

    def hold(self, key: str) -> Held | None:
        """Keep the entry `key` from being removed; None if there is none, or it is being removed."""
        try:
            descriptor = os.open(self.entry(key), os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return None
        held = Held(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:  # a file system without locks
            return held
        return held if os.fstat(descriptor).st_nlink > 0 else None

    def touch(self, key: str) -> None:
        """Note that the entry `key` was used now."""
        with suppress(OSError):
            os.utime(self.entry(key))

    def remove(self, key: str) -> bool:
        """Remove the entry `key`; False if a run is using it, or it cannot be removed."""
        return self._remove(self.entry(key))

    def make_room(self, nbytes: int) -> int:
        """Remove the entries that were not used for longest until `nbytes` more fit; gives the bytes freed."""
        self.sweep()
        entries = sorted(self._entries())
        sizes = {path: tree_bytes(path) for _, path in entries}
        total, freed = sum(sizes.values()), 0
        for _, path in entries:
            if total - freed + nbytes <= self.limit:
                break
            if self._remove(path):
                freed += sizes[path]
        return freed

    def older_than(self, seconds: float) -> list[str]:
        """The keys of entries that were last used longer ago."""
        until = time.time() - seconds
        return [path.name for used, path in self._entries() if used < until]

    def forget_weights(self) -> None:
        """Forget all digests of weight files."""
        with suppress(OSError):
            for path in list(self.weights.iterdir()):
                if (_ENTRY.fullmatch(path.name) or _HALF.fullmatch(path.name)) and not path.is_dir():
                    path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed runs have left half written."""
        for path in self._aside():
            self._remove(path)

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A locked folder that becomes the entry `key` when the `with` block ends; unless another run was faster.

        Raises:
            OSError: it cannot be written.
        """
        self.steps.mkdir(parents=True, exist_ok=True)
        partial = self.steps / f"{_ASIDE}{key}.{os.getpid()}.{time.monotonic_ns()}"
        partial.mkdir()
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            with suppress(FileExistsError, NotADirectoryError):
                if not self.entry(key).exists():
                    partial.rename(self.entry(key))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(descriptor)

    def _entries(self) -> Iterator[tuple[float, Path]]:
        for path in self._all():
            with suppress(OSError):
                if _ENTRY.fullmatch(path.name) and path.is_dir():
                    yield path.stat().st_mtime, path

    def _aside(self) -> list[Path]:
        return [path for path in self._all() if _HALF.fullmatch(path.name)]

    def _all(self) -> list[Path]:
        try:
            return list(self.steps.iterdir())
        except OSError:
            return []

    def _remove(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            away = path.with_name(f"{_ASIDE}{path.name.lstrip(_ASIDE)[:80]}.{os.getpid()}.{time.monotonic_ns()}")
            path.rename(away)
            shutil.rmtree(away, ignore_errors=True)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


def cache_folder(environment: Mapping[str, str] = os.environ) -> CacheFolder:
    """The cache that the environment names: `REGRAFT_CACHE`, else `regraft` in the user's folder for caches.

    Raises:
        UsageError: the size is none.
        ResourceError: there is no home folder.
    """
    limit = _limit(environment.get(SIZE, ""))
    shared = environment.get("XDG_CACHE_HOME", "")
    try:
        if named := environment.get(FOLDER):
            return CacheFolder(Path(named).expanduser(), limit)
        if Path(shared).is_absolute():
            return CacheFolder(Path(shared) / "regraft", limit)
        return CacheFolder(Path.home() / ".cache" / "regraft", limit)
    except RuntimeError:
        raise ResourceError(
            "there is no home folder for the cache", where=FOLDER, remedy=f"set {FOLDER} to a folder"
        ) from None


def _limit(text: str) -> int:
    if not text.strip():
        return DEFAULT_BYTES
    return 0 if text.strip() == "0" else parsed_size(text, SIZE)


def parsed_size(text: str, where: str) -> int:
    """Bytes of a size such as `20GB`; `where` is how an error names the place.

    Raises:
        UsageError: it is none.
    """
    try:
        return size_bytes(int(text) if text.strip().isdecimal() else text)
    except ValueError:
        expected = "a size such as 20GB or 500MiB, or a number of bytes"
        raise UsageError("not a size", where=where, expected=expected, found=repr(text),
                         remedy="write a number and its unit") from None  # fmt: skip


def tree_bytes(folder: Path) -> int:
    """Bytes of the files below `folder`; what goes away meanwhile does not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(Path(root, name)).st_size
    return total

"""Runs of `apply` in forks of this process, whose calls that change the disk are counted, and one of them hit.

A fork starts in milliseconds, so that every call of a run can be made to fail, one run for each.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

WRITES = ("pwrite", "posix_fallocate", "copy_file_range", "sendfile", "ftruncate", "fsync", "mkdir", "rename",
          "replace", "link")  # fmt: skip
"""Calls of `os` that change the disk; writes of file objects are counted with them, and their opening."""
READS = ("preadv", "copy_file_range")
"""Calls of `os` by which weights are read."""


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Args:
        code: of exit; negative for a signal.
        errors: stderr.
        calls: names of the calls that it made to change the disk, in order; empty if it was killed.
    """

    code: int
    errors: str
    calls: tuple[str, ...]


def run(
    arguments: list[str], at: int | None = None, act: Callable[[], None] | None = None, *,
    watch: tuple[str, ...] = WRITES,
) -> Outcome:  # fmt: skip
    """`regraft ARGUMENTS` in a fork; `act` is called before call number `at` of `watch`, and may raise in its place."""
    import regraft.cli.main  # noqa: F401 - before the fork, once for all

    with tempfile.TemporaryDirectory() as folder:
        errors, calls = Path(folder, "stderr"), Path(folder, "calls")
        pid = os.fork()
        if pid == 0:
            _child(arguments, errors, calls, Counter(at, act, watch))
        _, status = os.waitpid(pid, 0)
        return Outcome(
            os.waitstatus_to_exitcode(status),
            errors.read_text(errors="replace"),
            tuple(calls.read_text().split()) if calls.exists() else (),
        )


def _child(arguments: list[str], errors: Path, calls: Path, counter: Counter) -> NoReturn:
    code = 70
    try:
        descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        os.dup2(descriptor, 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # whatever a test runner had put in their place
        report = os.open(calls, os.O_WRONLY | os.O_CREAT)
        counter.install()
        from regraft.cli.main import run as command

        try:
            command(arguments)
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 1
        os.write(report, " ".join(counter.names).encode())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Counter:
    """Counts calls, and acts in place of one."""

    def __init__(self, at: int | None, act: Callable[[], None] | None, watch: tuple[str, ...]) -> None:
        self.at, self.act, self.watch = at, act, watch
        self.names: list[str] = []
        self._lock = threading.Lock()

    def step(self, name: str) -> None:
        """One more call."""
        with self._lock:
            number = len(self.names)
            self.names.append(name)
        if number == self.at and self.act is not None:
            self.act()

    def install(self) -> None:
        """From now on every call of this process is counted."""
        for name in self.watch:
            setattr(os, name, self._counted(name, getattr(os, name)))
        if self.watch != WRITES:
            return
        opened = io.open

        def opening(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+") or not isinstance(file, str | os.PathLike) or _device(file):
                return opened(file, mode, *arguments, **options)
            self.step("open")
            return Written(opened(file, mode, *arguments, **options), self)

        io.open = builtins.open = opening  # type: ignore[assignment]

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.step(name)
            return real(*arguments, **options)

        return call


class Written:
    """A file that is open for writing."""

    def __init__(self, file: Any, counter: Counter) -> None:
        self._file, self._counter = file, counter

    def write(self, data: Any) -> Any:
        """Counted."""
        self._counter.step("write")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Written:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


def _device(file: Any) -> bool:
    return os.fspath(file).startswith("/dev/")

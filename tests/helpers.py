"""Python in a process of its own, calls that fail as the system would, open files, and folders of small text files."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn


def run_python(program: str, *arguments: object, **environment: str) -> str:
    """What `program` prints, run with `arguments` and with `environment` added to ours."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def raising(code: int) -> Callable[..., NoReturn]:
    """A function that fails with this errno, whatever it is called with."""

    def fail(*arguments: object, **options: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


def descriptors() -> set[str]:
    """The files that this process has open."""
    open_files = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            open_files.add(str(link.readlink()))
        except OSError:
            continue
    return open_files


def fill(folder: Path, files: Mapping[str, str]) -> Path:
    """Write `files`, text by relative path, into `folder`, which is made; gives the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """The text of every file in `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    """What stands in `folder`."""
    return sorted(path.name for path in folder.iterdir())

"""The command line called inside the test's process, recipes written in a line, and folders compared byte by byte."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.core.testing.checkpoints import tree

__all__ = ["ABF", "Ran", "done", "load_recipe", "recipe_text", "regraft", "tree", "write_recipe"]


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its result."""
        return json.loads(self.out)

    @property
    def events(self) -> list[Any]:
        """The JSON lines on stderr."""
        return [json.loads(line) for line in self.err.splitlines()]


def regraft(*arguments: object) -> Ran:
    """Run `regraft` with these arguments in this process."""
    from regraft.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    with _signals_kept(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run([str(argument) for argument in arguments])
        except SystemExit as ending:
            code = ending.code
    assert isinstance(code, int)
    return Ran(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Ran:
    """Run `regraft`; it must succeed."""
    ran = regraft(*arguments)
    assert ran.code == 0, ran.err
    return ran


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    unraisable = sys.unraisablehook
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def recipe_text(base: object = "base", *steps: dict[str, Any], **output: Any) -> str:
    """A recipe: its base, its steps, and the keys of `[output]`."""
    lines = ["[base]", f"model = {json.dumps(str(base))}"]
    for step in steps:
        lines += ["[[steps]]", *(f"{key} = {json.dumps(value)}" for key, value in step.items())]
    return "\n".join([*lines, "[output]", *(f"{key} = {json.dumps(value)}" for key, value in output.items()), ""])


def write_recipe(file: Path, base: object = "base", *steps: dict[str, Any], **output: Any) -> Path:
    """Write what `recipe_text` gives."""
    file.write_text(recipe_text(base, *steps, **output))
    return file


def load_recipe(path: Path) -> Any:
    """The recipe, validated against the installed plugins."""
    from regraft.cli.options import validated

    return validated(str(path), None)


ABF = {"use": "context-extension", "method": "abf", "target_length": 4096}
"""A step that changes config.json alone."""

"""What reaches the terminal: results on stdout, progress and errors on stderr, both as JSON on request."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from regraft.core.errors import RegraftError
from regraft.core.report.numbers import nbytes

JSON_SCHEMA = 1
"""Version of every JSON object that commands print."""

INTERRUPTED = 130

human_bytes = nbytes
"""`3.48 GB`; units of a thousand."""


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON object on stdout; JSON has no NaN and no infinity, so these become strings."""
    document = _finite({"schema": JSON_SCHEMA, **document})
    print(json_text(document, sys.stdout, indent=2, allow_nan=False, default=str))


def json_text(document: Mapping[str, Any], stream: TextIO, **options: Any) -> str:
    """As JSON that `stream` can encode: in its own letters, else in escapes of JSON, which readers of JSON know."""
    text = json.dumps(document, ensure_ascii=False, **options)
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(document, **options)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def tell(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


def fail(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong; gives the exit code."""
    if not isinstance(error, RegraftError):
        remedy = "run again with --traceback and report it"
        error = RegraftError(f"unexpected {type(error).__name__}: {error}", remedy=remedy)
    facts = {"schema": JSON_SCHEMA, **error.as_json()}
    tell(json_text(facts, sys.stderr) if as_json else f"error: {error}")
    return error.exit_code


def interrupted(*, as_json: bool) -> int:
    """Say so; gives the exit code."""
    message = "interrupted; nothing incomplete is left in the target"
    facts = {"schema": JSON_SCHEMA, "error": "Interrupted", "exit_code": INTERRUPTED, "message": message}
    tell(json.dumps(facts) if as_json else message)
    return INTERRUPTED


def event(kind: str, **facts: Any) -> None:
    """One JSON object in one line on stderr."""
    tell(json_text({"schema": JSON_SCHEMA, "event": kind, **facts}, sys.stderr))


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Left-aligned columns; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


class Progress:
    """Bytes done of bytes to do: a bar with ETA on a terminal, JSON lines with `--json`, else nothing.

    The writer's workers report to it at the same time.
    """

    def __init__(self, show: Callable[[int, int], None]) -> None:
        self._show = show
        self._lock = threading.Lock()
        self.total = 0
        self.done = 0

    def start(self, total: int) -> None:
        """So many bytes will be written."""
        self.total = total
        self._show(0, total)

    def advance(self, nbytes: int) -> None:
        """So many more are."""
        with self._lock:
            self.done += nbytes
            self._show(self.done, self.total)


@contextmanager
def progress(*, as_json: bool) -> Iterator[Progress]:
    """A progress display for the time of a `with` block."""
    if as_json:
        yield Progress(_json_lines())
    elif sys.stderr.isatty():
        with _bar() as show:
            yield Progress(show)
    else:
        yield Progress(lambda done, total: None)


def _json_lines(interval_seconds: float = 0.5) -> Callable[[int, int], None]:
    last = [0.0]

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if now - last[0] >= interval_seconds or done >= total:
            last[0] = now
            event("progress", bytes=done, total_bytes=total)

    return show


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("write", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

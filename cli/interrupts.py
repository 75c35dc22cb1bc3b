"""Ctrl-C and requests to end: one exception while a command runs, nothing once its result is settled."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.05


class Interrupted(BaseException):
    """Ctrl-C or a request to end: not a `KeyboardInterrupt`, which typer would turn into exit code 1."""


def listen() -> None:
    """From now on a signal raises `Interrupted`; a second one, while that is dealt with, ends the process at once."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    sys.unraisablehook = _unraisable


def ignore() -> None:
    """From now on signals do nothing: the result is settled, and what is left is the interpreter's own shutdown."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: Any) -> None:
    del number, frame
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_DFL)
    raise Interrupted


def _unraisable(fault: Any) -> None:
    """An interrupt that came in a finaliser, from which Python lets nothing out, comes again a moment later."""
    if fault.exc_type is not Interrupted:
        sys.__unraisablehook__(fault)
        return
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    again = threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main)
    again.daemon = True
    again.start()

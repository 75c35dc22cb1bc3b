"""Ctrl-C and requests to end: one exception while a command runs, none while it clears away or once its result is
settled.

Python that uses regraft as a library keeps its own handlers: only `listen`, which the command line calls, sets these.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.05

_clearing = 0
"""How many blocks of `unbroken` the command is in."""
_waits = False
"""Whether a signal has come in one of them."""


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


@contextmanager
def unbroken() -> Iterator[None]:
    """What clears away: a first signal counts only when it is done, a second one ends the process at once.

    The first signal then raises `Interrupted`, unless an error is on its way, which ends the command anyway and says
    more: torchrun sends a signal to every process as soon as one of them has failed.
    """
    global _clearing, _waits
    _clearing += 1
    try:
        yield
    finally:
        _clearing -= 1
        if _waits and not _clearing:
            _waits = False
            if sys.exc_info()[1] is None:
                raise Interrupted
            listen()  # for whoever deals with the error and goes on


def _interrupt(number: int, frame: Any) -> None:
    global _waits
    del number, frame
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_DFL)
    if not _clearing:
        raise Interrupted
    _waits = True


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

"""The processes of one run: this one alone, or those that torchrun started together.

All of them plan and run the steps, so that they can compute together, and write weight files; the rest of the output is
the first one's, and it alone tells. What they say to each other outside of computations goes through torchrun's
key-value store: the work folder is ready, what was written, the target stands, the run has failed. torch is imported
only where there are several.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from regraft.core.errors import RegraftError, ResourceError, UsageError

READY, DONE = "ready", "done"
"""What the first process announces: others may enter the work folder; the target stands."""

_FIRST_TO_SHARE = (2, 13)
_FAILED, _LEFT = "failed", "left"
_CONNECT_SECONDS, _PARTING_SECONDS, _POLL_SECONDS, _WATCH_SECONDS = 60, 30, 0.05, 0.5
_PIECE_BYTES = 4 << 20
_INTERRUPTED = 130


class Ended(Exception):
    """Another process has failed and says so: this one ends in silence, with the same exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another process ended with {code}")
        self.code = code


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Args:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number on this machine, which is that of its CUDA device.
        local_world: how many are on this machine, where torchrun says so.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one locks, verifies, commits and tells."""
        return self.rank == 0

    def announce(self, event: str) -> None:
        """Tell all others that `event` has come."""
        if self.world > 1:
            store().set(event, "1")

    def wait(self, event: str) -> None:
        """Until `event` is announced, however long that takes.

        Raises:
            Ended: a process has failed.
        """
        while self.world > 1 and not _heard(event):
            time.sleep(_POLL_SECONDS)

    def watch(self) -> Callable[[], None]:
        """What one that works by itself calls all the time, from any thread; it asks every half second.

        Raises:
            Ended: from the call; a process has failed.
        """
        due = time.monotonic()

        def look() -> None:
            nonlocal due
            if self.world > 1 and time.monotonic() >= due:
                due = time.monotonic() + _WATCH_SECONDS
                _heard(DONE)

        return look

    def gather(self, what: str, text: str) -> list[str]:
        """Everybody's `text`, by rank, in the first process; elsewhere only one's own.

        Raises:
            Ended: a process has failed.
        """
        if not self.first:
            _send(f"{what}/{self.rank}", text)
            return [text]
        return [text, *(self._receive(f"{what}/{rank}") for rank in range(1, self.world))]

    def share(self, what: str, text: str) -> str:
        """The first one's `text`.

        Raises:
            Ended: a process has failed.
        """
        if not self.first:
            return self._receive(what)
        if self.world > 1:
            _send(what, text)
        return text

    def _receive(self, what: str) -> str:
        self.wait(what)
        pieces = range(int(store().get(what)))
        return zlib.decompress(b"".join(store().get(f"{what}/piece/{piece}") for piece in pieces)).decode()

    def part(self) -> None:
        """The last call of a run that succeeded: no more computing together, and whoever holds the store goes last."""
        if self.world == 1:
            return
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
        others, until = store().add(_LEFT, 0 if self.first else 1), time.monotonic() + _PARTING_SECONDS
        while self.first and others < self.world - 1 and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            others = store().add(_LEFT, 0)

    def failing(self, error: BaseException) -> None:
        """Tell the others now that this one fails with `error`, before they stumble over what it clears away."""
        if not isinstance(error, Ended):
            others = 1 if isinstance(error, Exception) else _INTERRUPTED
            self.ending(error.exit_code if isinstance(error, RegraftError) else others)

    def ending(self, code: int) -> tuple[bool, int]:
        """Whether this process, which fails with `code`, is the first to fail, and so the one that says why; and the
        code with which all end.
        """
        if self.world == 1:
            return True, code
        try:
            failed = store().compare_set(_FAILED, "", f"{self.rank} {code}").decode()
        except (RuntimeError, ResourceError, UsageError):  # no store any more: who held it has failed before
            return self.first, code
        rank, _, first_code = failed.partition(" ")
        return int(rank) == self.rank, int(first_code)


def processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """This process, from the variables that torchrun sets.

    Raises:
        UsageError: they contradict each other.
    """
    try:
        world = int(environment.get("WORLD_SIZE", "1"))
        if world <= 1:
            return Processes()
        rank = int(environment["RANK"])
        local_rank, local_world = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", "1")
        ours = Processes(rank, world, int(local_rank), int(local_world))
        if not 0 <= ours.rank < ours.world or not {"MASTER_ADDR", "MASTER_PORT"} <= set(environment):
            raise KeyError("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT")
    except (ValueError, KeyError) as error:
        raise UsageError(
            "the environment does not say which process this is",
            where="WORLD_SIZE",
            expected="all of WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them",
            found=error,
            remedy="start it with torchrun, or unset WORLD_SIZE",
        ) from None
    return ours


def torch_shares_out() -> bool:
    """Whether this torch can share out what learns: its FSDP2 sums the gradients of what not every process has used, as
    from 2.13 on. With another one every process has a copy of everything.
    """
    from importlib.metadata import version

    from packaging.version import Version

    return Version(version("torch")).release >= _FIRST_TO_SHARE


@cache
def store() -> Any:
    """The key-value store that all processes share, with keys of our own.

    Raises:
        ResourceError: it does not answer.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        shared, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_CONNECT_SECONDS)))
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(
            "the other processes cannot be reached",
            where=f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            found=str(error).splitlines()[0],
            remedy="look at their messages, and at the network between the machines",
        ) from None
    return PrefixStore("regraft", shared)


def _send(what: str, text: str) -> None:
    """In pieces, because torch's store takes only values of a few megabytes; the number of pieces last."""
    data = zlib.compress(text.encode())
    pieces = [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)]
    for number, piece in enumerate(pieces):
        store().set(f"{what}/piece/{number}", piece)
    store().set(what, str(len(pieces)))


def _heard(event: str) -> bool:
    try:
        if store().check([_FAILED]):
            raise Ended(int(store().get(_FAILED).decode().partition(" ")[2]))
        return bool(store().check([event]))
    except RuntimeError:  # the connection is gone, and with it the process that held the store
        raise Ended(1) from None

"""Kill, interrupt, race, starve and confuse `regraft apply`, and look at what it leaves behind.

Usage: python -m tests.faults.campaign [short] [--seed N] [--minutes M] [--only NAME ...]

Run from outside pytest because it takes minutes: `nox -s faults`, in CI `nox -s faults -- short`. After every accident
the target is absent, what it was, or complete by `regraft verify`; nothing else stands beside it but the work folder of
a killed run; the exit code is the documented one, and nobody sees a traceback. Ends with the counts and exit code 0, or
with the first violation and exit code 1. What does not fit the time is left out, and said.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import broken_off, cache, clocks, disk, torchrun
from tests.faults.scene import Scene, Violation

FULL_MINUTES, SHORT_MINUTES = 25.0, 2.5
LARGE_MEGABYTES, SMALL_MEGABYTES = 60, 0.5


def scenarios(short: bool) -> dict[str, Callable[[Scene, Scene], str]]:
    """Name and what is done, with the large base where moments matter, with the small one where numbers do."""

    def counts(of_short: int, of_full: int) -> int:
        return of_short if short else of_full

    return {
        "writes": lambda large, small: disk.every_write(small, counts(6, 1)),
        "reads": lambda large, small: disk.unreadable(small, counts(8, 1)),
        "vanishing": lambda large, small: disk.vanishing(small, counts(24, 2)),
        "rights": lambda large, small: disk.without_rights(small),
        "small disk": lambda large, small: disk.small_disk(small),
        "clocks": lambda large, small: (
            clocks.clocks(small, kinds=["to and fro"], training=False) if short else clocks.clocks(small)
        ),
        "cache": lambda large, small: cache.damaged(small, counts(14, 1)),
        "kills": lambda large, small: broken_off.kills(large, counts(5, 100)),
        "interrupts": lambda large, small: broken_off.interrupts(large, counts(2, 20)),
        "races": lambda large, small: broken_off.races(large, counts(1, 8)),
        "trainings": lambda large, small: broken_off.trainings(large, counts(1, 10)),
        "torchrun": lambda large, small: torchrun.signals(large, counts(1, 12)),
    }


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", nargs="?", choices=["short", "full"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help=f"bound; {SHORT_MINUTES} for short, {FULL_MINUTES} for full")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    options = parser.parse_args()
    short = options.size == "short"
    end = time.monotonic() + 60 * (options.minutes or (SHORT_MINUTES if short else FULL_MINUTES))
    chosen = {name: run for name, run in scenarios(short).items()
              if not options.only or name in options.only}  # fmt: skip
    left_out = []
    os.environ["REGRAFT_CACHE_SIZE"] = "0"  # a result that is kept would hide what a run does
    with tempfile.TemporaryDirectory(prefix="regraft-faults-") as folder:
        rng = random.Random(options.seed)
        scenes = []
        for name, megabytes in (("large", LARGE_MEGABYTES), ("small", SMALL_MEGABYTES)):
            Path(folder, name).mkdir()
            scenes.append(Scene(Path(folder, name), rng, megabytes, lambda: time.monotonic() < end))
        for name, run in chosen.items():
            if time.monotonic() > end:
                left_out.append(name)
                continue
            started = time.monotonic()
            try:
                print(f"{name}: {run(*scenes)} ({time.monotonic() - started:.0f} s)", flush=True)
            except Violation as violation:
                sys.exit(f"VIOLATION in {name} (seed {options.seed}): {violation}")
    if left_out:
        print(f"NOT RUN, no time: {', '.join(left_out)}")


if __name__ == "__main__":
    main()

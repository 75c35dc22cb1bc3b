"""Runs that are killed, interrupted or raced at random moments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping

from tests.faults.scene import TIMEOUT_SECONDS, Scene, digests, expect, said_plainly


def kills(scene: Scene, count: int) -> str:
    """SIGKILL at random moments of runs into a new target, and every third time of runs that replace one."""
    seconds, absent, complete, left = scene.finish(), 0, 0, 0
    for number in scene.rounds(count):
        replacing = number % 3 == 2
        shutil.rmtree(scene.target, ignore_errors=True)
        if replacing:
            scene.finish()
        process = scene.start("--force")
        if number % 2:  # while it writes, which is the smaller part of the time
            wait_for(scene.work.exists, process)
            time.sleep(scene.rng.uniform(0.0, 0.2) * seconds)
        else:
            time.sleep(scene.rng.uniform(0.1, 1.0) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT_SECONDS)
        there = scene.check(f"kill {number}", must_exist=True if replacing else None)
        absent, complete, left = absent + (not there), complete + there, left + scene.work.exists()
    shutil.rmtree(scene.target, ignore_errors=True)
    scene.finish()  # takes over whatever the last one left
    told = f"{absent} left the target absent, {complete} complete; {left} left the work folder"
    return f"{absent + complete} of {count} kills: {told}"


def wait_for(come: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until something is there, or the process has ended."""
    until = time.monotonic() + TIMEOUT_SECONDS
    while not come() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


def interrupts(scene: Scene, count: int) -> str:
    """Ctrl-C and SIGTERM: exit code 130 (or 0 if the run was faster), and no work folder."""
    scene.clear()
    seconds, done = scene.finish(), 0
    for number in scene.rounds(count):
        when = f"interrupt {number}"
        shutil.rmtree(scene.target, ignore_errors=True)
        process = scene.start()
        time.sleep(scene.rng.uniform(0.5, 1.0) * seconds)
        process.send_signal(scene.rng.choice([signal.SIGINT, signal.SIGTERM]))
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        there = scene.check(when, must_exist=True if process.returncode == 0 else None, work=False)
        # Killed by the signal itself: it came before the handler was installed, or while the interpreter shut down.
        allowed = {130, -signal.SIGINT, -signal.SIGTERM} | ({0} if there else set())
        expect(process.returncode in allowed, f"{when}: exit code {process.returncode}: {errors}")
        if process.returncode == 130:
            said_plainly(errors, when)
        done += 1
    return f"{done} of {count} interrupts: all with the documented exit code and nothing left"


def races(scene: Scene, count: int) -> str:
    """Two runs at once: into one target one wins, the other says so or runs after it; into two both succeed."""
    done = 0
    for number in scene.rounds(count):
        scene.clear()
        both = [scene.start(), scene.start()]
        results = [(process.communicate(timeout=TIMEOUT_SECONDS)[1], process.returncode) for process in both]
        codes = sorted(code for _, code in results)
        expect(codes[0] == 0 and codes[1] in (2, 4), f"race {number}: exit codes {codes}: {results}")
        said_plainly(next(errors for errors, code in results if code), f"race {number}")
        scene.check(f"race {number}", must_exist=True, work=False)
        apart(scene, number)
        done += 1
    return f"{done} races into one target, each with one winner, and {done} into two targets, with the same bytes"


def apart(scene: Scene, number: int) -> None:
    """Two runs from one base into two targets."""
    scene.clear()
    other = scene.root / "elsewhere" / "out"
    scene.stable.add("elsewhere")
    both = [scene.start(), scene.start(target=other)]
    results = [(process.communicate(timeout=TIMEOUT_SECONDS)[1], process.returncode) for process in both]
    expect([code for _, code in results] == [0, 0], f"race {number} into two targets: {results}")
    scene.check(f"race {number} into two targets", must_exist=True, work=False)
    expect(digests(scene.target) == digests(other), f"race {number}: two targets, two contents")
    expect([path.name for path in other.parent.iterdir()] == ["out"], f"race {number}: stray files")
    shutil.rmtree(other.parent)
    scene.stable.discard("elsewhere")


def trainings(scene: Scene, count: int) -> str:
    """A run that trains, broken off again and again, ends with the bytes of one that was left alone."""
    scene.clear()
    seconds, expected = scene.finish(recipe=scene.training), digests(scene.target)
    broken = resumed = 0
    for number in scene.rounds(count):
        shutil.rmtree(scene.target)
        for _ in range(3):
            process = scene.start(recipe=scene.training)
            time.sleep(scene.rng.uniform(0.3, 1.0) * seconds)
            process.send_signal(scene.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
            process.communicate(timeout=TIMEOUT_SECONDS)
            if scene.check(f"training {number}"):
                break
            broken += 1
            resumed += any((scene.work / "state").glob("*/*/step-*"))
        else:
            scene.finish(recipe=scene.training)
        unlike(expected, digests(scene.target), f"training {number}")
        expect(not scene.work.exists(), f"training {number} leaves its work folder")
    return f"{broken} trainings broken off, {resumed} with a state to go on from: the same bytes every time"


def unlike(expected: Mapping[str, str], found: Mapping[str, str], when: str) -> None:
    """Refuse other bytes, by name."""
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    expect(not names, f"{when}: other bytes than when left alone: {names}")

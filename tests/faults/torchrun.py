"""Signals to torchrun and to single processes of a run: all end, and what stands is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults.broken_off import wait_for
from tests.faults.scene import TIMEOUT_SECONDS, Scene, expect

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "regraft")
_MARK = "REGRAFT_FAULTS_RUN"
_END_SECONDS = 45
"""torchrun itself waits 30 s for a process that it has asked to end."""
VICTIMS: tuple[tuple[int | None, signal.Signals], ...] = (
    (None, signal.SIGTERM), (1, signal.SIGTERM), (0, signal.SIGTERM), (None, signal.SIGINT), (1, signal.SIGKILL),
    (0, signal.SIGKILL),
)  # fmt: skip
"""The rank that gets a signal (None: torchrun itself), and which."""


def signals(scene: Scene, count: int) -> str:
    """A signal at a random moment of a run of two processes, of weights and of a training in turn."""
    told: dict[str, int] = {}
    for number in scene.rounds(count):
        scene.clear()
        rank, kind = VICTIMS[number % len(VICTIMS)]
        recipe = scene.training if number % 2 == 0 else scene.recipe
        when = f"{kind.name} to {'torchrun' if rank is None else f'rank {rank}'}, {recipe.name}"
        mark = uuid.uuid4().hex
        command = [*TORCHRUN, "apply", str(recipe), "-o", str(scene.target), "--no-durable"]
        process = subprocess.Popen(command, env={**os.environ, _MARK: mark}, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        wait_for(partial(_both, mark), process)
        time.sleep(scene.rng.uniform(0.0, 8.0))
        victim = process.pid if rank is None else _ranks(mark).get(rank)
        if victim is not None and process.poll() is None:
            os.kill(victim, kind)
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        until = time.monotonic() + _END_SECONDS
        while (alive := list(_processes(mark))) and time.monotonic() < until:
            time.sleep(0.2)
        expect(not alive, f"{when}: processes {alive} live on")
        there = scene.check(when, must_exist=True if process.returncode == 0 else None)
        expect(_ours(errors) <= 1, f"{when}: several messages: {errors}")
        killed = kind == signal.SIGKILL
        kept = scene.work.exists() and any((scene.work / "state").rglob("step-*"))
        expect(killed or not scene.work.exists() or kept, f"{when}: leaves the work folder: {errors}")
        outcome = "complete" if there else "absent"
        told[outcome] = told.get(outcome, 0) + 1
    scene.clear()
    counts = ", ".join(f"{number} {outcome}" for outcome, number in told.items())
    return f"{sum(told.values())} of {count} signals to runs of two processes: all processes ended, the target {counts}"


def _ours(errors: str) -> int:
    """Our messages; torchrun adds a report of its own."""
    return sum(line.startswith(("error:", "interrupted")) for line in errors.splitlines())


def _both(mark: str) -> bool:
    return len(_ranks(mark)) == 2


def _processes(mark: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Processes of a run that are alive, with their environment."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "environ").read_bytes().decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{_MARK}={mark}" in text and state != "Z":
            yield int(entry.name), dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def _ranks(mark: str) -> dict[int, int]:
    """Process by rank."""
    return {int(variables["RANK"]): pid for pid, variables in _processes(mark) if "RANK" in variables}

"""Clocks that are wrong or jump while a run goes on: the same bytes as ever, for work on weights and for trainings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.faults.broken_off import unlike
from tests.faults.odd_clock import JUMPS
from tests.faults.scene import TIMEOUT_SECONDS, Scene, digests, expect

ROOT = Path(__file__).parents[2]


def clocks(scene: Scene, *, kinds: Sequence[str] = tuple(JUMPS), training: bool = True) -> str:
    """Kinds of odd clocks; with `training` for a training too, and times of files that lie far away."""
    recipes = [scene.recipe, *([scene.training] if training else [])]
    for recipe in recipes:
        scene.clear()
        scene.finish(recipe=recipe)
        expected = digests(scene.target)
        for kind in kinds:
            shutil.rmtree(scene.target)
            command = [sys.executable, "-m", "tests.faults.odd_clock", kind, "apply", str(recipe), "-o",
                       str(scene.target), "--no-durable"]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
                                  check=False)  # fmt: skip
            when = f"a clock that goes {kind}, {recipe.name}"
            expect(done.returncode == 0, f"{when}: exit code {done.returncode}: {done.stderr}")
            expect("Traceback" not in done.stderr, f"{when}: {done.stderr}")
            scene.check(when, must_exist=True, work=False)
            unlike(expected, digests(scene.target), when)
    scene.clear()
    if training:
        _old_files(scene)
    old = ", and files of 1970 and 2100" if training else ""
    return f"{len(kinds)} odd clocks for {len(recipes)} recipes{old}: the same bytes"


def _old_files(scene: Scene) -> None:
    scene.finish()
    expected = digests(scene.target)
    for seconds in (0, 4_102_444_800):
        for path in (*scene.base.iterdir(), scene.base, scene.recipe):
            os.utime(path, (seconds, seconds))
        scene.clear()
        scene.finish()
        unlike(expected, digests(scene.target), f"files of {seconds}")
    scene.clear()

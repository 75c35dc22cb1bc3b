"""A disk that fills up or breaks at every single call, files that vanish or shrink while they are read, rights."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.faults import disk_calls
from tests.faults.scene import (
    REGRAFT,
    TIMEOUT_SECONDS,
    Scene,
    digests,
    expect,
    said_plainly,
    without_roots_rights,
)


def warm(scene: Scene) -> list[str]:
    """Import everything that a run needs, so that forks need not; gives the arguments of a run."""
    from tests.running import done

    arguments = ["apply", str(scene.recipe), "-o", str(scene.target)]
    done(*arguments, "--no-durable")
    shutil.rmtree(scene.target)
    return arguments


def failing(code: int) -> Callable[[], None]:
    """What raises the error of the operating system."""

    def act() -> None:
        raise OSError(code, os.strerror(code))

    return act


def every_write(scene: Scene, stride: int) -> str:
    """ENOSPC at every call that changes the disk, into a new target and over an old one; EIO and EDQUOT likewise."""
    arguments, told = warm(scene), []
    for code, replacing in ((errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False), (errno.EDQUOT, False)):
        old = _old_target(scene, arguments) if replacing else None
        options = [*arguments, "--force"] if replacing else arguments
        _restore(scene, old)
        calls = disk_calls.run(options).calls
        done = 0
        for number in scene.rounds(len(calls), stride):
            before = _restore(scene, old)
            when = f"{errno.errorcode[code]} at call {number} of {len(calls)}, {calls[number]}"
            judged(scene, disk_calls.run(options, number, failing(code)), number, when, before)
            done += 1
        over = " over an old target" if replacing else ""
        told.append(f"{errno.errorcode[code]} at {done} of {len(calls)} calls{over}")
    scene.clear()
    return "; ".join(told) + ": exit code 4, the target what it was, nothing left"


def _old_target(scene: Scene, arguments: list[str]) -> Path:
    """A target of another recipe, to be replaced."""
    old = scene.root.parent / "old"
    if not old.exists():
        scene.clear()
        ran = disk_calls.run([*arguments, "--no-durable", "--set", "output.dtype=bfloat16"])
        expect(ran.code == 0, f"a clean run failed: {ran.errors}")
        scene.target.rename(old)
    return old


def _restore(scene: Scene, old: Path | None) -> dict[str, str]:
    scene.clear()
    if old is None:
        return {}
    shutil.copytree(old, scene.target)
    return digests(old)


def judged(scene: Scene, ran: disk_calls.Outcome, number: int, when: str, before: dict[str, str]) -> None:
    """A run whose disk failed says so and leaves what was there."""
    harmless = number >= len(ran.calls) or ran.calls[number] == "mkdir" or ran.calls[number:] == ("rename",)
    if ran.code == 0 and harmless:
        # this run had fewer calls; or the folder was there already; or it was the clearing away that failed
        scene.check(when, must_exist=True)
        return
    expect(ran.code == 4, f"{when}: exit code {ran.code}: {ran.errors}")
    said_plainly(ran.errors, when)
    if (digests(scene.target) if scene.target.exists() else {}) != before:
        # the last flush of all, when the new target stands already
        expect(ran.calls[number] == "fsync", f"{when}: the target has changed")
        scene.check(when, must_exist=True, work=False)
    stray = {path.name for path in scene.root.iterdir()} - scene.stable - {"out"}
    expect(not stray, f"{when}: leaves {sorted(stray)}")


def small_disk(scene: Scene) -> str:
    """A file system that is too small: refused before writing; and, where it lies about its space, when it is full."""
    small = scene.root / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, check=False
    )  # fmt: skip
    if mounted.returncode != 0:
        small.rmdir()
        return "NOT RUN: no right to mount a small file system"
    try:
        command = [*REGRAFT, "apply", str(scene.recipe), "-o", str(small / "out")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        expect(done.returncode == 4 and "disk" in done.stderr, f"a small disk: {done.returncode} {done.stderr}")
        expect(not list(small.iterdir()), f"a small disk: leaves {list(small.iterdir())}")
        usage = shutil.disk_usage(small)
        shutil.disk_usage, real = lambda path: usage._replace(free=1 << 40), shutil.disk_usage  # type: ignore[assignment]
        try:
            ran = disk_calls.run(command[len(REGRAFT) :])
        finally:
            shutil.disk_usage = real
        expect(ran.code == 4 and "disk is full" in ran.errors, f"a full disk: {ran.code} {ran.errors}")
        expect(not list(small.iterdir()), f"a full disk: leaves {list(small.iterdir())}")
    finally:
        subprocess.run(["umount", str(small)], check=True)
        small.rmdir()
    return "refused before writing with exit code 4; and stopped with it when it fills up, nothing left"


def vanishing(scene: Scene, stride: int) -> str:
    """A shard of the base is removed, cut or made unreadable at every call of a run."""
    arguments = [*warm(scene), "--no-durable"]
    calls, kept = disk_calls.run(arguments).calls, scene.root.parent / "kept-base"
    scene.clear()
    shutil.copytree(scene.base, kept)
    refused = survived = 0
    for shard in sorted(scene.base.glob("*.safetensors")):
        for name, act in hurts(shard):
            for number in scene.rounds(len(calls), stride):
                when = f"{shard.name} {name} at call {number} of {len(calls)}"
                ran = disk_calls.run(arguments, number, act)
                expect(ran.code in (0, 3), f"{when}: exit code {ran.code}: {ran.errors}")
                if ran.code:
                    said_plainly(ran.errors, when)
                    expect(shard.name in ran.errors, f"{when}: the file is not named: {ran.errors}")
                shutil.copy2(kept / shard.name, shard)
                scene.check(when, must_exist=ran.code == 0, work=False)
                scene.clear()
                refused, survived = refused + (ran.code == 3), survived + (ran.code == 0)
    shutil.rmtree(kept)
    expect(digests(scene.base) == scene.base_bytes, "the base has changed")
    return f"{refused} times exit code 3 and nothing written, {survived} times read before, and complete"


def hurts(shard: Path) -> Iterable[tuple[str, Callable[[], None]]]:
    """What can become of a file while it is read."""
    size = shard.stat().st_size
    yield "removed", shard.unlink
    yield "cut to nothing", lambda: os.truncate(shard, 0)
    yield "cut in the middle", lambda: os.truncate(shard, size // 2)
    yield "cut by a byte", lambda: os.truncate(shard, size - 1)


def unreadable(scene: Scene, stride: int) -> str:
    """EIO at every read of a weight."""
    arguments = [*warm(scene), "--no-durable"]
    calls = disk_calls.run(arguments, watch=disk_calls.READS).calls
    scene.clear()
    done = 0
    for number in scene.rounds(len(calls), stride):
        when = f"EIO at read {number} of {len(calls)}"
        ran = disk_calls.run(arguments, number, failing(errno.EIO), watch=disk_calls.READS)
        expect(ran.code == 3, f"{when}: exit code {ran.code}: {ran.errors}")
        said_plainly(ran.errors, when)
        scene.check(when, must_exist=False, work=False)
        done += 1
    return f"EIO at {done} of {len(calls)} reads: exit code 3, nothing written"


def without_rights(scene: Scene) -> str:
    """Folders and files that the user may not write or read."""
    locked, cases = scene.root / "locked", 0
    arguments = ["apply", str(scene.recipe), "-o", str(locked / "out"), "--no-durable"]
    locked.mkdir()
    scene.stable.add("locked")
    shard = next(scene.base.glob("*.safetensors"))
    probe = subprocess.run(["cat", str(shard)], preexec_fn=_unreadable(shard), capture_output=True, check=False)
    shard.chmod(0o644)
    if probe.returncode == 0:
        locked.rmdir()
        scene.stable.discard("locked")
        return "NOT RUN: this root cannot give up its rights"
    for path, mode, code, word in ((locked, 0o555, 4, "read-only"), (shard, 0o000, 3, "permission denied"),
                                   (scene.base / "config.json", 0o000, 3, "permission denied"),
                                   (scene.base, 0o000, 3, "permission denied"),
                                   (scene.recipe, 0o000, 2, "permission denied")):  # fmt: skip
        before = path.stat().st_mode
        path.chmod(mode)
        try:
            done = subprocess.run([*REGRAFT, *arguments], preexec_fn=without_roots_rights, capture_output=True,
                                  text=True, timeout=TIMEOUT_SECONDS, check=False)  # fmt: skip
        finally:
            path.chmod(before)
        when = f"{path.name} with mode {mode:o}"
        expect(done.returncode == code and word in done.stderr.lower(), f"{when}: {done.returncode}: {done.stderr}")
        said_plainly(done.stderr, when)
        expect(not list(locked.iterdir()), f"{when}: leaves {list(locked.iterdir())}")
        cases += 1
    locked.rmdir()
    scene.stable.discard("locked")
    return f"{cases} cases: the documented exit code, nothing written"


def _unreadable(path: Path) -> Callable[[], None]:
    path.chmod(0)
    return without_roots_rights

"""A step cache that is damaged, unwritable or full: a run says so, works it out again, and ends with the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import disk_calls
from tests.faults.broken_off import unlike
from tests.faults.disk import failing
from tests.faults.scene import Scene, digests, expect

FOLDER = "REGRAFT_CACHE"


def damaged(scene: Scene, stride: int) -> str:
    """Every file of an entry is removed, emptied, cut, or has a byte changed; and the folder itself is no folder."""
    folder = scene.root / "cache"
    scene.stable.add(folder.name)
    before = {name: os.environ.pop(name, None) for name in (FOLDER, "REGRAFT_CACHE_SIZE")}
    os.environ[FOLDER] = str(folder)
    try:
        return _damaged(scene, folder, stride)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
        scene.stable.discard(folder.name)
        scene.clear()


def _damaged(scene: Scene, folder: Path, stride: int) -> str:
    arguments = ["apply", str(scene.training), "-o", str(scene.target), "--no-durable", "--set", "fine-tune.steps=2"]
    import transformers.models.llama.modeling_llama  # noqa: F401 - before the forks

    scene.clear()
    ran = disk_calls.run(arguments)
    expect(ran.code == 0 and "from the cache" not in ran.errors, f"a clean run failed: {ran.errors}")
    expected, entries = digests(scene.target), list((folder / "steps").iterdir())
    expect(len(entries) == 1, f"{len(entries)} entries, and one was expected")
    kept = scene.root.parent / "kept-cache"
    shutil.copytree(folder, kept)
    files = sorted(path.relative_to(folder) for path in entries[0].rglob("*") if path.is_file())
    cases = [(file, name) for file in files for name in DAMAGES]
    done = 0
    for file, name in [(files[0], "nothing"), *cases[::stride]]:
        if done and not scene.due():
            break
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        if name != "nothing":
            DAMAGES[name](folder / file)
        _same(scene, arguments, expected, f"{file.name} {name}", hit=name == "nothing")
        done += name != "nothing"
    for name, act in _unusable(folder):
        act()
        _same(scene, arguments, expected, name, hit=False)
    shutil.rmtree(kept)
    full = _full(scene, folder, arguments, expected, 4 if stride > 1 else 32)
    return f"{done} of {len(cases)} damages of {len(files)} files, 2 folders that are none, {full}: the same bytes"


def _same(scene: Scene, arguments: list[str], expected: dict[str, str], when: str, *, hit: bool) -> None:
    """A run ends well, and says what it did."""
    scene.clear()
    ran = disk_calls.run(arguments)
    expect(ran.code == 0, f"{when}: exit code {ran.code}: {ran.errors}")
    expect("Traceback" not in ran.errors, f"{when}: {ran.errors}")
    expect(("from the cache" in ran.errors) == hit, f"{when}: {ran.errors}")
    expect(hit or "warning" in ran.errors, f"{when}: it says nothing: {ran.errors}")
    scene.check(when, must_exist=True, work=False)
    unlike(expected, digests(scene.target), when)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "with a changed bit": _flip,
    "removed": Path.unlink,
    "emptied": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "of other bytes": _garbage,
    "that is a folder": _folder,
}
"""What can become of a file of an entry."""


def _unusable(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    def file_instead() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_text("no folder")

    def file_inside() -> None:
        folder.unlink(missing_ok=True)
        folder.mkdir()
        (folder / "steps").write_text("no folder")

    yield "a cache that is a file", file_instead
    yield "a cache whose steps are a file", file_inside


def _full(scene: Scene, folder: Path, arguments: list[str], expected: dict[str, str], count: int) -> str:
    """ENOSPC at calls that write into the cache: the run goes on without it."""
    shutil.rmtree(folder)
    scene.clear()
    calls = disk_calls.run(arguments).calls
    tried = 0
    for number in range(0, len(calls), max(1, len(calls) // count)):
        if not scene.due():
            break
        shutil.rmtree(folder, ignore_errors=True)
        scene.clear()
        when = f"ENOSPC at call {number} of {len(calls)}, {calls[number]}, with a cache"
        ran = disk_calls.run(arguments, number, failing(errno.ENOSPC))
        expect(ran.code in (0, 4), f"{when}: exit code {ran.code}: {ran.errors}")
        expect("Traceback" not in ran.errors, f"{when}: {ran.errors}")
        there = scene.check(when, must_exist=ran.code == 0)
        if there:
            unlike(expected, digests(scene.target), when)
        tried += 1
    return f"a disk that is full at {tried} calls"

"""The step cache: results of steps that work by themselves are kept, so that a recipe runs again from its first change.

A result is looked up by its key (`core/cache_key.py`), compared with its digests before it is used, and is then the
patch that the step would have returned, to the byte of the output. Nothing about the cache can fail a run: what is
damaged is dropped and computed again, and what cannot be kept is not, with a warning.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from regraft.core.cache_entry import check_entry, entry_bytes, load_entry, read_entry, save_entry
from regraft.core.cache_folder import CacheFolder, cache_folder
from regraft.core.cache_key import StepKey, step_keys
from regraft.core.checkpoint import Checkpoint
from regraft.core.devices import resolve_device
from regraft.core.errors import RegraftError, ResourceError
from regraft.core.patch import Patch
from regraft.core.plan import Plan, PlannedStep, outputs_of
from regraft.core.processes import Processes, store
from regraft.core.provenance import torch_threads
from regraft.core.requirements import disk_bytes

_CHEAP_BYTES = 10**9
"""Weights that `plan` reads at most to say what is in the cache: a second's work."""


_NONE = CacheFolder(Path(), 0)


class StepCache:
    """The cache as one run sees it."""

    def __init__(
        self,
        plan: Plan,
        device: str,
        target: Path,
        say: Callable[[str], None],
        ours: Processes,
        *,
        strict: bool = False,
        wanted: bool = True,
    ) -> None:
        """Work out the keys.

        Args:
            plan: what runs.
            device: on which steps compute.
            target: where the output goes, whose disk is not to be filled.
            say: tells the user.
            ours: of all processes, which all use an entry or all do not.
            strict: as in `Run`.
            wanted: False turns the cache off.

        Raises:
            UsageError: the environment gives it a size that is none.
        """
        self._plan, self._device, self._target, self._say, self._ours = plan, device, target, say, ours
        self._strict = strict
        self.hits: list[str] = []
        self._wanted = wanted and any(step.works_by_itself for step in plan.steps)
        self._folder = self._found() if self._wanted else _NONE
        self._keys = self._all_keys() if self._folder.limit and self._usable() else ()

    def find(self, index: int, checkpoint: Checkpoint) -> Patch | None:
        """The kept result of a step, if there is a sound one; None if the step is to run.

        Args:
            index: of the step in the plan.
            checkpoint: what the step sees.
        """
        if not self._wanted or not (step := self._plan.steps[index]).works_by_itself:
            return None
        patch = self._load(step, self._keys[index].key, checkpoint) if self._keys else None
        if not _all_have(self._ours, f"cache {index}", patch is not None):
            return None
        self.hits.append(step.id)
        logs = ", ".join(name for name, _ in outputs_of(step.params))
        self._tell(f"{step.id}: from the cache" + (f"; nothing is written to {logs}" if logs else ""))
        return patch

    def keep(self, index: int, patch: Patch, below: Checkpoint, above: Checkpoint, seconds: float) -> None:
        """Keep what a step returned, after it ran.

        Args:
            index: of the step in the plan.
            patch: its result.
            below: what it saw.
            above: `below` seen through the patch.
            seconds: how long it took.
        """
        step = self._plan.steps[index]
        if not self._keys or not self._ours.first or not step.works_by_itself:
            return
        key, reason = self._keys[index].key, self._keys[index].reason
        if key is None:
            self._tell(f"{step.id}: not kept in the cache: {reason}")
            return
        try:
            if trouble := self._objection(index, key, patch, below):
                self._tell(f"{step.id}: not kept in the cache: {trouble}")
                return
            with self._folder.writing(key) as folder:
                save_entry(folder, patch, below, above, {**self._facts(step, key), "seconds": round(seconds, 1)})
        except (RegraftError, OSError) as error:
            self._tell(f"warning: {step.id}: not kept in the cache {self._folder.path}: {_why(error)}")

    def _objection(self, index: int, key: str, patch: Patch, below: Checkpoint) -> str:
        """Why this result is not to be kept; empty if it is, and then there is room for it."""
        if below.packed is not None and any(not edit.operation.kind for edit in patch.edits.values()):
            return "the base is quantised, and the step's formulas cannot be stored"
        if self._all_keys()[index].key != key:
            return "an input has changed while the step ran"
        size = entry_bytes(patch, below)
        if size > self._folder.limit:
            return f"it takes {size} bytes, and the cache may hold {self._folder.limit} (REGRAFT_CACHE_SIZE)"
        self._folder.make_room(size)
        if size + self._promised() > shutil.disk_usage(self._folder.path).free:
            return f"it takes {size} bytes, and the disk has no room for it beside the output"
        return ""

    def _promised(self) -> int:
        """Bytes that the output still takes of the cache's disk."""
        parent = next(folder for folder in self._target.resolve().parents if folder.exists())
        same = parent.stat().st_dev == self._folder.path.stat().st_dev
        return disk_bytes(self._plan, link=False) if same else 0

    def _found(self) -> CacheFolder:
        try:
            return cache_folder()
        except ResourceError as error:
            self._tell(f"warning: no cache: {error.message}")
            return _NONE

    def _usable(self) -> bool:
        """Whether entries can be written; if not, a warning, and no cache."""
        folder = self._folder.steps
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if _writable(folder):
                return True
            why = "it cannot be written"
        except OSError as error:
            why = _why(error)
        self._tell(f"warning: no cache: {self._folder.path}: {why}")
        return False

    def _all_keys(self) -> tuple[StepKey, ...]:
        threads = torch_threads(self._plan, self._device)
        return step_keys(self._plan, self._folder, self._device, threads, strict=self._strict, world=self._ours.world)

    def _load(self, step: PlannedStep, key: str | None, checkpoint: Checkpoint) -> Patch | None:
        held = None if key is None else self._folder.hold(key)
        if key is None or held is None:
            return None
        try:
            entry = read_entry(self._folder.entry(key))
            check_entry(entry)
            patch = load_entry(entry, checkpoint, held)
            why = ", ".join(step.outline.deviations(patch))
        except (RegraftError, OSError) as error:
            why = _why(error)
        if not why:
            self._folder.touch(key)
            return patch
        self._tell(f"warning: {step.id}: the cache entry {key[:16]} is damaged ({why}): the step runs again")
        del held
        self._folder.remove(key)
        return None

    def _facts(self, step: PlannedStep, key: str) -> dict[str, object]:
        kind = type(step.transformation)
        return {
            "key": key,
            "recipe": self._plan.recipe.name,
            "base": self._plan.base.label,
            "step": step.id,
            "use": kind.name,
            "version": kind.version,
            "plugin": step.plugin.distribution,
            "plugin_version": step.plugin.version,
            "device": self._device.split(":")[0],
            "torch_threads": torch_threads(self._plan, self._device),
        }

    def _tell(self, line: str) -> None:
        if self._ours.first:
            self._say(line)


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _why(error: RegraftError | OSError) -> str:
    if isinstance(error, RegraftError):
        return error.found or error.message
    return error.strerror or str(error)


def _all_have(ours: Processes, what: str, mine: bool) -> bool:
    """Whether every process has it: those that compute together must all compute, or none."""
    if ours.world == 1:
        return mine
    store().set(f"{what} {ours.rank}", "1" if mine else "0")
    for rank in range(ours.world):
        ours.wait(f"{what} {rank}")
    return all(store().get(f"{what} {rank}") == b"1" for rank in range(ours.world))


def kept_steps(plan: Plan) -> list[str]:
    """Ids of the steps whose results are in the cache, for `plan`; none where that takes long to tell.

    Raises:
        UsageError: the environment gives the cache a size that is none.
    """
    if not any(step.works_by_itself for step in plan.steps):
        return []
    try:
        folder = cache_folder()
    except ResourceError:
        return []
    if not folder.limit or not folder.entries() or not _writable(folder.steps):
        return []
    device = _likely_device()
    threads = _likely_threads(folder) if device == "cpu" else None
    keys = step_keys(plan, folder, device, threads, most_bytes=_CHEAP_BYTES)
    return [
        step.id
        for step, of in zip(plan.steps, keys, strict=True)
        if of.key is not None and folder.entry(of.key).is_dir()
    ]


def _likely_device() -> str:
    """What `--device auto` will be; torch is imported only where the machine may have another device than its CPU."""
    if any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return resolve_device("auto")
    return "cpu"


def _likely_threads(folder: CacheFolder) -> int | None:
    """With how many threads `apply` will compute: torch, which takes seconds to import, is not asked, but the
    environment, or else the entry that was used last.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal():
        return int(given)
    for key in folder.entries():
        with suppress(RegraftError):
            if (threads := read_entry(folder.entry(key)).facts.get("torch_threads")) is not None:
                return int(threads)
    return None

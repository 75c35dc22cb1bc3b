"""`regraft reproduce`: run again what a lock file records, and compare every tensor and every file.

A lock file has no absolute paths, so inputs are looked for where its relative ones lead from a folder, or where the
user says (see `recorded_inputs`); and because digests tell which inputs they were, a wrong one is refused before
anything is computed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import ADAPTER_CONFIG, CONFIG
from regraft.core.environment import Difference, differences
from regraft.core.errors import InputError, RegraftError, ResourceError, UsageError
from regraft.core.execute import ApplyOptions, Events, apply
from regraft.core.host import Host
from regraft.core.hub_upload import licensed
from regraft.core.jsonio import read_object
from regraft.core.lock_file import check_runnable
from regraft.core.recorded_inputs import RecordedInputs, Whereabouts
from regraft.core.sources.folder import CARD, LOCK
from regraft.core.verify import Finding

if TYPE_CHECKING:
    from regraft.core.checkpoint import Checkpoint
    from regraft.core.recipe.model import Recipe


@dataclass(frozen=True)
class ReproduceReport:
    """What came out.

    Args:
        lock: the record.
        device: class of device that computed.
        tensors, files: how many have the recorded bytes.
        findings: what differs (fatal), and what could not be compared.
        environment: what is not as it was.
        output: the new output, if it was kept.
    """

    lock: Path
    device: str
    tensors: int
    files: int
    findings: tuple[Finding, ...]
    environment: tuple[Difference, ...]
    output: Path | None

    @property
    def differing(self) -> list[Finding]:
        """What has other bytes than recorded."""
        return [finding for finding in self.findings if finding.fatal]


def read_lock(path: Path) -> tuple[Path, dict[str, Any]]:
    """The lock file that `path` is or holds, and its contents.

    Raises:
        InputError: there is none, or it is not one that this regraft reads.
    """
    lock = path / LOCK if path.is_dir() else path
    if not lock.is_file():
        raise InputError("there is no lock file", where=lock, expected=f"{LOCK}, or a folder with it",
                         remedy="name the output of a recipe")  # fmt: skip
    document = read_object(lock)
    check_runnable(document, lock)
    return lock, document


def reproduce(
    path: Path,
    host: Host,
    whereabouts: Whereabouts,
    *,
    out: Path | None = None,
    device: str | None = None,
    threads: int = 0,
    events: Events | None = None,
) -> ReproduceReport:
    """Run a record again, without the step cache, and compare.

    Args:
        path: a lock file, or the folder with it.
        host: the plugins.
        whereabouts: of the inputs.
        out: keep the new output there; None compares it in a temporary folder beside the record, and removes it.
        device: None takes the recorded class of device, or the CPU where that is not there.
        threads: of the writer.
        events: see `apply`.

    Raises:
        InputError: an input is missing, or is not the recorded one; or the record is malformed.
        UsageError: `out` holds something, or stands inside the checkpoint of the record.
        RegraftError: the run failed.
    """
    lock, record = read_lock(path)
    if out is not None:
        _check_out(out, lock)
    recipe, base = recorded(record, lock, host, whereabouts)
    device = device or _recorded_device(record)
    options = ApplyOptions(device=device, threads=threads, durable=False, verify="structure", cache=False)
    events = events or Events()
    with _target(lock, out) as target:
        with _torch_threads(record["environment"].get("torch_threads"), events):
            report = apply(recipe, target, host, options, events, base=base)
        _, made = read_lock(target)
        made = _as_published(made, record, target)
        environment = tuple(differences(record, made))
        findings, tensors, files = compare(record, made)
    return ReproduceReport(
        lock, made["environment"]["device"], tensors, files, tuple(findings), environment, out and report.target
    )


def _check_out(out: Path, lock: Path) -> None:
    folder = lock.resolve().parent
    if any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)) and out.resolve().is_relative_to(folder):
        raise UsageError("stands inside the output of the record", where=f"--out {out}", expected="a folder outside it",
                         remedy="name another: what was recorded stays as it was verified")  # fmt: skip
    if out.is_dir() and any(out.iterdir()):
        raise UsageError("the folder holds something already", where=f"--out {out}", expected="a folder, new or empty",
                         remedy="name another")  # fmt: skip


def recorded(record: Mapping[str, Any], lock: Path, host: Host, whereabouts: Whereabouts) -> tuple[Recipe, Checkpoint]:
    """The recipe and the base of a record, with all inputs found and compared with their digests.

    Raises:
        RegraftError: as `reproduce`.
    """
    _check_plugins(record, host, lock)
    inputs = RecordedInputs(record, lock, host, whereabouts)
    recipe, base = inputs.recipe(), inputs.base()
    inputs.check(recipe, base)
    return recipe, base


def _as_published(made: dict[str, Any], record: Mapping[str, Any], target: Path) -> dict[str, Any]:
    """What was pushed with a licence given by hand has it in its card: so must what it is compared with."""
    licence = (record.get("published") or {}).get("license")
    if licence is None:
        return made
    card = licensed((target / CARD).read_bytes(), licence)
    digest = {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    return {**made, "output": {**made["output"], "files": {**made["output"]["files"], CARD: digest}}}


def compare(record: Mapping[str, Any], made: Mapping[str, Any]) -> tuple[list[Finding], int, int]:
    """Hold the output of one lock file against that of another: findings, tensors that agree, files that agree."""
    findings: list[Finding] = []
    counts = []
    for kind, fact in (("tensors", "digest"), ("files", "sha256")):
        before, after = record["output"].get(kind, {}), made["output"].get(kind, {})
        found = list(_differing(kind[:-1], fact, before, after))
        findings += found
        counts.append(len(before) - len({finding.where for finding in found if finding.where in before}))
    unstated = [name for name, facts in record["output"].get("tensors", {}).items() if facts.get("digest") is None]
    if unstated:
        message = f"{len(unstated)} tensors have no digest in the record, so only dtype and shape were compared"
        findings.append(Finding(message, "the record", fatal=False))
    return findings, counts[0], counts[1]


def _differing(
    kind: str, fact: str, before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            yield Finding(f"the {kind} was recorded, and is not made again", name)
        elif name not in before:
            yield Finding(f"the {kind} is made, and was not recorded", name)
        else:
            keys = [key for key in before[name] if before[name][key] != after[name].get(key)]
            keys = [key for key in keys if key != fact or None not in (before[name][key], after[name].get(key))]
            if keys:
                stated, found = ([str(facts.get(key)) for key in keys] for facts in (before[name], after[name]))
                yield Finding(f"the {kind} differs", name, ", ".join(stated), ", ".join(found))


def _check_plugins(record: Mapping[str, Any], host: Host, lock: Path) -> None:
    known = host.transformations()
    for step in record.get("steps", []):
        if step["use"] not in known and step["use"] not in host.broken:
            wanted = f"{step.get('plugin')} {step.get('plugin_version')}"
            raise InputError(
                "a step's transformation is not installed", where=f"{lock}: {step['id']}", expected=step["use"],
                remedy=f"install the plugin that was used: {wanted}",
            )  # fmt: skip


def _recorded_device(record: Mapping[str, Any]) -> str:
    """The recorded class of device, or the CPU where there is none."""
    recorded = str(record["environment"].get("device", "cpu"))
    if recorded == "cpu":
        return "cpu"
    from regraft.core.devices import resolve_device

    try:
        return resolve_device(recorded)
    except RegraftError:
        return "cpu"


@contextmanager
def _torch_threads(recorded: int | None, events: Events) -> Iterator[None]:
    """While this lasts torch computes with as many threads as recorded; None for a record whose bytes do not depend on
    them, or which is too old to say.
    """
    if recorded is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    if before == recorded:
        yield
        return
    events.say(f"torch computes with the recorded number of threads, {recorded}, in place of {before}")
    torch.set_num_threads(recorded)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _target(lock: Path, out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    folder = lock.resolve().parent
    try:
        above = Path(tempfile.mkdtemp(prefix=f".{folder.name}.reproduce-", dir=folder.parent))
    except OSError as error:
        raise ResourceError(f"no room for the new output: {error.strerror}", where=folder.parent,
                            remedy="say where to put it: --out DIR") from None  # fmt: skip
    try:
        yield above / "output"
    finally:
        shutil.rmtree(above, ignore_errors=True)

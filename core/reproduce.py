"""`regraft reproduce`: run again what a lock file records, and compare every tensor and every file.

A lock file has no absolute paths, so inputs are looked for where its relative ones lead from a folder, or where the
user says; and because digests tell which inputs they were, a wrong one is refused before anything is computed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from regraft.core.checkpoint import Checkpoint
from regraft.core.environment import Difference, differences
from regraft.core.errors import InputError, RegraftError, ResourceError, UsageError
from regraft.core.execute import ApplyOptions, Events, apply
from regraft.core.host import Host
from regraft.core.hub_upload import licensed
from regraft.core.jsonio import brief, read_object
from regraft.core.operations import leaves
from regraft.core.provenance import LOCK_SCHEMA, data_digests
from regraft.core.recipe.document import leaves as values_of
from regraft.core.recipe.load import recipe_from
from regraft.core.recipe.model import Recipe
from regraft.core.recipe.nodes import PATH_FORMATS, shape_of
from regraft.core.recipe.references import Reference
from regraft.core.recipe.shipped import shipped_names, shipped_path
from regraft.core.recipe.wording import KeyPath
from regraft.core.sources import open_checkpoint
from regraft.core.sources.folder import CARD, LOCK
from regraft.core.verify import Finding
from regraft.core.verify.lock import digest_as, table

_NO_ORIGIN = ("model", "digest", "tensors")
_ON_DISK = ("folder", "gguf")
"""Sources of bases that have no other place than a path."""
_REMEDY = "say where the inputs are: --base PATH, --data STEP.KEY=PATH, or --inputs DIR for relative paths"


@dataclass(frozen=True)
class Whereabouts:
    """Where the inputs of a record are.

    Args:
        base: the base; None takes the recorded name.
        data: paths by `STEP.KEY`.
        folder: where relative paths of the record start.
    """

    base: Path | None = None
    data: Mapping[str, Path] = field(default_factory=dict)
    folder: Path = Path()


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
    if document.get("schema") != LOCK_SCHEMA:
        raise InputError("a lock file of another version", where=lock, expected=f"schema {LOCK_SCHEMA}",
                         found=brief(document.get("schema")), remedy="use the regraft that wrote it")  # fmt: skip
    for key in ("recipe", "base", "output", "environment"):
        table(document, key, lock)
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
        RegraftError: the run failed.
    """
    lock, record = read_lock(path)
    _check_plugins(record, host, lock)
    located = _Located(record, lock, host, whereabouts)
    recipe, base = located.recipe(), located.base()
    located.check(recipe, base)
    device = device or _recorded_device(record)
    options = ApplyOptions(device=device, threads=threads, durable=False, verify="structure", cache=False)
    with _target(lock, out) as target:
        report = apply(recipe, target, host, options, events, base=base)
        _, made = read_lock(target)
        made = _as_published(made, record, target)
        environment = tuple(differences(record, made))
        findings, tensors, files = compare(record, made)
    return ReproduceReport(
        lock, made["environment"]["device"], tensors, files, tuple(findings), environment, out and report.target
    )


def _as_published(made: dict[str, Any], record: Mapping[str, Any], target: Path) -> dict[str, Any]:
    """What was pushed with a licence given by hand has it in its card: so must what it is compared with."""
    licence = record.get("published", {}).get("license")
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


class _Located:
    """A record with its inputs found; what is missing or wrong is collected, and told together."""

    def __init__(self, record: Mapping[str, Any], lock: Path, host: Host, whereabouts: Whereabouts) -> None:
        self._record, self._lock, self._host, self._whereabouts = record, lock, host, whereabouts
        self._problems: list[str] = []
        self._unused = set(whereabouts.data)

    def recipe(self) -> Recipe:
        """The recorded recipe, reading the inputs where they are now, and resolving to the recorded text.

        Raises:
            RecipeError: this regraft cannot run it.
        """
        data = deepcopy(dict(self._record["recipe"]))
        references: dict[KeyPath, Reference] = {}
        for index, step in enumerate(data.get("steps", [])):
            for place, written, usable in self._inputs(step, self._record["steps"][index]):
                references["steps", index, *place] = Reference(written, usable, self._lock.parent)
                _put(step, place, usable)
        self._tell_unused()
        if (there := self._base_place()) is not None:
            references["base", "model"] = Reference(data["base"]["model"], there, self._lock.parent)
            data["base"]["model"] = there
        recipe = recipe_from(data, self._lock, (), self._host.transformations(), self._host.broken)
        return recipe.with_references(references)

    def base(self) -> Checkpoint:
        """The base, as recorded but for where it is.

        Raises:
            InputError: it is not there.
        """
        stated = self._record["base"]
        origin = {key: value for key, value in stated.items() if key not in _NO_ORIGIN}
        model, place = str(stated.get("model")), self._base_place()
        if place is None and origin.get("source") in _ON_DISK:
            raise self._missing([*self._problems, f"base: there is no {model} in {self._whereabouts.folder}"])
        commit = origin.get("commit") if place is None else None
        try:
            checkpoint = open_checkpoint(place or model, revision=commit, extra=self._host.sources())
        except InputError as error:
            found = f"{error.where}: {error.message}" if error.where else error.message
            raise self._missing([*self._problems, f"base: {found}"]) from None
        return replace(checkpoint, label=model, origin=origin)

    def check(self, recipe: Recipe, base: Checkpoint) -> None:
        """Compare every input with its recorded digest.

        Raises:
            InputError: with all that are missing or differ.
        """
        problems = [*self._problems, *_base_problems(base, self._record["base"], self._lock)]
        for step, stated in zip(recipe.steps, self._record["steps"], strict=True):
            found = data_digests(step.params)
            for key, digest in stated.get("data", {}).items():
                if key in found and found[key] != digest:
                    problems.append(f"{step.id}.{key}: {_shown(found[key])}, not the recorded {_shown(digest)}")
        if problems:
            raise self._missing(problems)

    def _base_place(self) -> str | None:
        """Where the base is on this disk; None for a name that a source knows."""
        there = self._whereabouts.folder / Path(self._record["base"]["model"]).expanduser()
        named = self._whereabouts.base or (there if there.exists() else None)
        return None if named is None else str(named.resolve())

    def _inputs(self, step: dict[str, Any], stated: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str, str]]:
        """Places of a step's inputs, as recorded and as they are now."""
        params: type[BaseModel] = self._host.transformations()[step["use"]].Params
        values = {key: value for key, value in step.items() if key not in ("use", "id")}
        shape = shape_of(params)
        for place, written in values_of(values):
            formats = [node.get("format", "") for node in shape.at(place, values) if node.get("type") == "string"]
            kind = formats[0] if isinstance(written, str) and formats else ""
            if kind not in (*PATH_FORMATS, "data", "model"):
                continue
            key = _key(place)
            recorded = key in stated.get("data", {}) or f"{key}[0]" in stated.get("data", {})
            usable = self._place_of(f"{step['id']}.{key}", written)
            if usable is not None:
                yield place, written, usable
            elif recorded or kind in PATH_FORMATS:
                self._problems.append(f"{step['id']}.{key}: there is no {written} in {self._whereabouts.folder}")

    def _place_of(self, key: str, written: str) -> str | None:
        for name in (key, f"{key}[0]", key.removesuffix(".source"), key.removesuffix("[0]").removesuffix(".source")):
            if name in self._whereabouts.data:
                self._unused.discard(name)
                named = self._whereabouts.data[name]
                if named.exists():
                    return str(named.resolve())
                self._problems.append(f"{key}: there is no {named}")
                return None
        for folder in self._folders():
            if (there := folder / Path(written).expanduser()).exists():
                return str(there.resolve())
        return None

    def _folders(self) -> Iterator[Path]:
        """Where relative paths may start: what a shipped recipe reads is shipped beside it."""
        yield self._whereabouts.folder
        name = str(self._record["recipe"].get("name"))
        if name in shipped_names():
            yield shipped_path(name).parent

    def _tell_unused(self) -> None:
        if self._unused:
            keys = [f"{step['id']}.{key}" for step in self._record["steps"] for key in step.get("data", {})]
            raise UsageError("the record has no such input", where=f"--data {min(self._unused)}",
                             expected=", ".join(keys) or "no data at all", remedy="name one of these")  # fmt: skip

    def _missing(self, problems: list[str]) -> InputError:
        return InputError(
            "inputs are missing, or are not the recorded ones", where=self._lock, found="; ".join(problems),
            remedy=_REMEDY,
        )  # fmt: skip


def _base_problems(base: Checkpoint, stated: Mapping[str, Any], lock: Path) -> Iterator[str]:
    if base.digest != stated.get("digest"):
        yield "base: its config, other files or shapes are not the recorded ones"
    packed = base.packed.tensors.values() if base.packed is not None else ()
    stored = {leaf.spec.name: leaf for tensor in (*base.tensors.values(), *packed) for leaf in leaves(tensor).values()}
    for name, digest in stated.get("tensors", {}).items():
        tensor = stored.get(name)
        if tensor is None:
            yield f"base: it has no tensor {name}"
            return
        if tensor.raw is not None and (found := digest_as(tensor, digest, f"{lock}: base: {name}")) != digest:
            yield f"base: {name} is {found}, not the recorded {digest}"
            return


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


def _key(place: KeyPath) -> str:
    """`data.source[0]`, as lock files name inputs."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _put(container: Any, place: KeyPath, value: str) -> None:
    for part in place[:-1]:
        container = container[part]
    container[place[-1]] = value


def _shown(digest: Any) -> str:
    return digest[:16] if isinstance(digest, str) else f"{len(digest)} files"

"""The keys under which results of steps are kept: SHA-256 over everything that decides a result.

That is the base by its contents, the keys of all steps before, the transformation with its code, the parameters with
digests in place of paths, the seed, and the machine as far as it decides bits. What cannot be fingerprinted (a data set
of the hub, a base whose source names no files) has no key, and neither has any step after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from regraft.core.buffers import reading
from regraft.core.cache_folder import CacheFolder
from regraft.core.checkpoint import Checkpoint
from regraft.core.derived import ConstantTensor
from regraft.core.errors import RegraftError
from regraft.core.file_patterns import from_pattern, matched
from regraft.core.operations import ComputedTensor
from regraft.core.plan import Plan, PlannedStep
from regraft.core.provenance import PACKAGES, package_version, sha256
from regraft.core.recipe.document import leaves as values_of
from regraft.core.recipe.nodes import PATH_FORMATS, shape_of
from regraft.core.sources import open_checkpoint
from regraft.core.tensors import LazyTensor
from regraft.core.transfer import hash_range, new_hasher

KEY_SCHEMA = 1
_SETTLED_SECONDS = 2.0
"""A file that has changed so lately may change again without its times telling so: file systems count in ticks."""
_VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "MKL_CBWR", "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_INTERPRET",
)  # fmt: skip
"""Environment variables by which libraries compute other bits."""


class _NoKeyError(Exception):
    """Something that decides the result cannot be fingerprinted; the text says what."""


@dataclass(frozen=True)
class StepKey:
    """The key of one step, or why it has none.

    Args:
        key: hexadecimal; None for a step that is not kept.
        reason: why a result that is worth keeping is not kept; empty for one that is not worth it.
    """

    key: str | None
    reason: str = ""


def step_keys(
    plan: Plan,
    folder: CacheFolder,
    device: str,
    threads: int | None,
    *,
    strict: bool = False,
    world: int = 1,
    most_bytes: int | None = None,
) -> tuple[StepKey, ...]:
    """The key of every step of a plan.

    Args:
        plan: whose steps they are.
        folder: remembers digests of weight files.
        device: on which steps compute, such as `cpu` or `cuda:0`.
        threads: with how many, see `torch_threads`.
        strict: as in `Run`.
        world: how many processes compute together.
        most_bytes: give up rather than read more than so many bytes of weights; None reads what it takes.
    """
    if not any(step.works_by_itself for step in plan.steps):
        return tuple(StepKey(None) for _ in plan.steps)
    try:
        chain = [_base_digest(plan, folder, most_bytes), *_numerics(device, threads, strict=strict, world=world)]
    except (_NoKeyError, RegraftError, OSError) as trouble:
        return tuple(StepKey(None, str(trouble) if step.works_by_itself else "") for step in plan.steps)
    return tuple(_along(plan, chain, folder, most_bytes))


def _along(plan: Plan, chain: list[str], folder: CacheFolder, most_bytes: int | None) -> Iterator[StepKey]:
    """Each step's key, which holds those of the steps before it; after a step without one there are none."""
    reason = ""
    for step in plan.steps:
        try:
            chain = [] if reason else [*chain, _digest([*chain, _step(step, folder, most_bytes)])]
        except (_NoKeyError, RegraftError, OSError) as trouble:
            reason = str(trouble)
        if not step.works_by_itself:
            yield StepKey(None)
        else:
            yield StepKey(None, reason) if reason else StepKey(chain[-1])


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _base_digest(plan: Plan, folder: CacheFolder, most_bytes: int | None) -> str:
    """Of the base by its contents, and of the seed and what else holds for all steps."""
    contents = checkpoint_digest(plan.base, folder, most_bytes)
    return _digest([KEY_SCHEMA, contents, plan.recipe.seed, plan.recipe.base.trust_remote_code])


def checkpoint_digest(checkpoint: Checkpoint, folder: CacheFolder, most_bytes: int | None = None) -> str:
    """Digest of specs, files and weights. `Checkpoint.digest` alone knows no weight, so it could not tell a base from
    the same base after one more epoch. Weight files are hashed whole (XXH3, a fraction of what it takes to build the
    model that the step asks for); while device, inode, size and times of a file are the same, its digest is remembered.
    """
    files = sorted(set(_weight_files(checkpoint)))
    unknown = [path for path in files if _remembered(path, folder) is None]
    if most_bytes is not None and sum(path.stat().st_size for path in unknown) > most_bytes:
        raise _NoKeyError("the weights of the base have not been read before")
    return _digest([checkpoint.digest, [[path.name, _weights(path, folder)] for path in files]])


def _weight_files(checkpoint: Checkpoint) -> Iterator[Path]:
    shown = list(checkpoint.tensors.values())
    stored = list(checkpoint.packed.tensors.values()) if checkpoint.packed is not None else []
    for tensor in [*shown, *stored]:
        yield from _homes(tensor, checkpoint.label)


def _homes(tensor: LazyTensor, label: str) -> Iterator[Path]:
    """The files that a tensor of a base is read from."""
    path = tensor.raw.path if tensor.raw is not None else getattr(getattr(tensor, "file", None), "path", None)
    brought = isinstance(tensor, ComputedTensor) and tensor.operation.operands
    if isinstance(path, Path):
        yield path
    elif tensor.sources and not brought:
        for source in tensor.sources:
            yield from _homes(source, label)
    elif not isinstance(tensor, ConstantTensor):  # whose values come from the config
        raise _NoKeyError(f"the source of {label} does not say which files its weights are in")


def _weights(path: Path, folder: CacheFolder) -> str:
    """XXH3 of a weight file, from memory where the file is surely the same."""
    if (known := _remembered(path, folder)) is not None:
        return known
    before = _signature(path)
    hasher = new_hasher("xxh3")
    with reading(path) as descriptor:
        hash_range(descriptor, 0, path.stat().st_size, hasher, where=path)
    if _signature(path) != before:
        raise _NoKeyError(f"{path} has changed while it was read")
    _remember(path, folder, hasher.hexdigest())
    return hasher.hexdigest()


def _signature(path: Path) -> list[Any]:
    """What changes when a file is changed or replaced. The change time is the system's own: no tool sets it back."""
    facts = path.stat()
    return [str(path.resolve()), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _remembered(path: Path, folder: CacheFolder) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        text = (folder.weights / _digest(_signature(path))).read_text()
        if len(text) == 32 and text.isalnum():
            return text
    return None


def _remember(path: Path, folder: CacheFolder, digest: str) -> None:
    facts = path.stat()
    if time.time() - max(facts.st_mtime, facts.st_ctime) < _SETTLED_SECONDS:
        return
    place = folder.weights / _digest(_signature(path))
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.{os.getpid()}")
        partial.write_text(digest)
        partial.rename(place)


def _numerics(device: str, threads: int | None, *, strict: bool, world: int) -> list[str]:
    """What of machine and installation decides bits."""
    names = ("regraft", "datasets", *PACKAGES)
    packages = {name: package_version(name) for name in names}
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    code = [code_digest("regraft.core"), code_digest("regraft.kernels")]
    return [_digest([packages, variables, code, _computer(device), threads, strict, world])]


def _computer(device: str) -> list[str]:
    if not device.startswith("cuda"):
        return ["cpu", platform.machine()]
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return ["cuda", torch.cuda.get_device_name(device), f"{major}.{minor}", str(torch.version.cuda)]


def _step(step: PlannedStep, folder: CacheFolder, most_bytes: int | None) -> list[Any]:
    if step.outline.unrecorded:
        raise _NoKeyError(f"{step.outline.unrecorded} is named by neither recipe nor base")
    kind = type(step.transformation)
    plugin = [step.plugin.distribution, step.plugin.version, kind.name, kind.version, code_digest(_package(kind))]
    return [step.id, plugin, _resolved(step.params, folder, most_bytes)]


def _package(kind: type) -> str:
    """The package that a transformation's code is in: a first-party plugin's own, or a stranger's whole package; in a
    namespace, which has no file of its own, the package below it.
    """
    parts = kind.__module__.split(".")
    if parts[:2] == ["regraft", "plugins"]:
        return ".".join(parts[:3])
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return next((name for name in names if getattr(sys.modules.get(name), "__file__", None)), names[-1])


@cache
def code_digest(name: str) -> str:
    """Digest of the Python files of a loaded package or module: who develops a plugin changes code, not versions."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return ""
    home = Path(file)
    sources = sorted(home.parent.rglob("*.py")) if home.name == "__init__.py" else [home]
    return _digest([[path.relative_to(home.parent).as_posix(), sha256(path)] for path in sources])


def _resolved(params: BaseModel, folder: CacheFolder, most_bytes: int | None) -> list[Any]:
    """The parameters, defaults and all, by place; paths to inputs by what is there, paths to outputs left out."""
    data, shape = params.model_dump(mode="json", by_alias=True), shape_of(type(params))
    found = []
    for path, value in values_of(data):
        formats = [node.get("format", "") for node in shape.at(path, data) if node.get("type") == "string"]
        if "output-path" not in formats:
            kind = formats[0] if isinstance(value, str) and formats else ""
            found.append([list(path), _value(value, kind, folder, most_bytes)])
    return found


def _value(value: Any, kind: str, folder: CacheFolder, most_bytes: int | None) -> Any:
    if kind not in (*PATH_FORMATS, "data", "model"):
        return value
    path = Path(value).expanduser()
    if kind == "model":
        checkpoint = open_checkpoint(value)
        return [path.name, checkpoint_digest(checkpoint, folder, most_bytes)]
    if path.is_dir():
        inner = sorted(file for file in path.rglob("*") if file.is_file())
        return [path.name, [[file.relative_to(path).as_posix(), sha256(file)] for file in inner]]
    if path.is_file():
        return [path.name, sha256(path)]
    if kind == "data" and (files := matched(value)):
        return [from_pattern(value), [[name, sha256(file)] for name, file in files.items()]]
    if kind == "data":
        raise _NoKeyError(f"the contents of the data set {value} cannot be known without fetching it")
    return value

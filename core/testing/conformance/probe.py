"""Run as a process of its own: uses transformations under other conditions, each in a fork, and prints JSON.

Usage: python -m regraft.core.testing.conformance.probe JOBS.json

First every transformation is imported and plans, in a process that has imported nothing heavy; then torch is imported,
once for all, and every transformation is applied under an audit of what is written, and on a large base.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

HEAVY = ("torch", "transformers", "tensorflow", "jax")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PLACES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.truncate": ((0, -1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}
"""Audit events that change the disk: where among the arguments a changed path stands, and the folder it starts from."""


def main() -> None:
    """Do every job, and print what each gave, by number."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    sys.dont_write_bytecode = True
    found: list[dict[str, Any]] = [{} for _ in jobs]
    _prepare()
    for job, facts in zip(jobs, found, strict=True):
        if job["light"]:
            facts["light"] = forked(partial(plan, job))
    import torch  # noqa: F401

    for job, facts in zip(jobs, found, strict=True):
        facts["applied"] = forked(partial(apply, job))
        if job["large"]:
            facts["memory"] = forked(partial(measure, job))
    print(json.dumps(found))


def _prepare() -> None:
    """Import what every job needs of regraft, which is light itself, so that no fork has to."""
    import regraft.core.execute  # noqa: F401
    from regraft.core.testing.running import host_of

    host_of().transformations()


def forked(work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What `work` gives in a copy of this process; `{"error": ...}` if it raises or dies."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        os.dup2(2, 1)  # what a plugin prints is no answer
        with os.fdopen(sink, "w") as answer:
            try:
                json.dump(dict(work()), answer)
            except BaseException as error:
                text = "".join(traceback.format_exception_only(error)).strip()
                json.dump({"error": text, "kind": type(error).__name__}, answer)
        os._exit(0)
    os.close(sink)
    with os.fdopen(source) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    answered: dict[str, Any] = json.loads(text) if text else {"error": f"the process ended with status {status}"}
    return answered


def plan(job: Mapping[str, Any]) -> dict[str, Any]:
    """Import, check and plan: what heavy modules that has imported."""
    kind = _kind(job)
    imported = _heavy()
    from regraft.core.sources import open_checkpoint
    from regraft.core.testing.running import make_recipe

    (step,) = make_recipe(job["base"], _step(job, kind)).steps
    checkpoint, made = open_checkpoint(job["base"]), kind()
    made.check(checkpoint, step.params)
    made.plan(checkpoint, step.params)
    return {"import": imported, "plan": _heavy()}


def apply(job: Mapping[str, Any]) -> dict[str, Any]:
    """Apply to every base, in a current folder, a home and a folder for temporary files that are empty."""
    import torch

    from regraft.core.testing.running import apply_recipe

    torch.set_num_threads(job["torch_threads"])
    kind, watched = _kind(job), _watched(Path(job["scratch"]))
    threads, outputs = int(os.environ["OMP_NUM_THREADS"]), Path(job["outputs"])
    before = settings()
    with audited([outputs, Path(job["scratch"]) / "caches", Path(job["scratch"]) / "TMPDIR", Path("/dev")]) as written:
        for name, base in job["bases"].items():
            apply_recipe(base["base"], _step(base, kind), to=outputs / name, threads=threads)
    after = settings()
    left = [str(path) for folder in watched for path in sorted(folder.rglob("*")) if path.is_file()]
    changed = [name for name in before if before[name] != after[name]]
    return {"written": sorted(written), "left": [Path(path).name for path in left], "changed": changed}


def settings() -> dict[str, Any]:
    """What a step could change of the process, and should not."""
    import numpy
    import torch

    return {
        "current folder": Path.cwd(),
        "environment": dict(os.environ),
        "random": random.getstate(),
        "numpy.random": str(numpy.random.get_state()),
        "torch generator": bytes(torch.get_rng_state().numpy().data),
        "torch threads": torch.get_num_threads(),
        "torch default dtype": torch.get_default_dtype(),
        "torch default device": torch.get_default_device(),
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch gradients": torch.is_grad_enabled(),
    }


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """How much the peak of memory grows from a small base to a large one, and what the plan says of it, in bytes."""
    from regraft.core.errors import RegraftError
    from regraft.core.plan import memory_beside_torch
    from regraft.core.testing.running import apply_recipe

    kind, outputs, large = _kind(job), Path(job["outputs"]), job["large"]
    os.chdir(outputs)
    apply_recipe(job["base"], _step(job, kind), to=outputs / "small")
    before = _peak()
    try:
        report = apply_recipe(large["base"], _step(large, kind), to=outputs / "large")
    except RegraftError as error:
        return {"refused": error.message}
    return {"grown": _peak() - before, "bound": memory_beside_torch(report.plan)}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _heavy() -> list[str]:
    return sorted(set(HEAVY) & set(sys.modules))


def _kind(job: Mapping[str, Any]) -> Any:
    found: Any = importlib.import_module(job["module"])
    for name in job["name"].split("."):
        found = getattr(found, name)
    return found


def _step(job: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    return {"use": kind, "id": "step", **job["params"]}


def _watched(scratch: Path) -> list[Path]:
    """Empty folders that the process now has for its current folder, home and temporary files."""
    folders = {name: scratch / name for name in ("cwd", "HOME", "TMPDIR", "caches")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    os.environ.update({name: str(folders[name]) for name in ("HOME", "TMPDIR")})
    tempfile.tempdir = None  # it is remembered once it was asked for
    caches = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    os.environ.update(dict.fromkeys(caches, str(folders["caches"])))
    os.chdir(folders["cwd"])
    return [folders[name] for name in ("cwd", "HOME", "TMPDIR")]


@contextmanager
def audited(allowed: list[Path]) -> Iterator[set[str]]:
    """The paths outside the allowed folders that Python writes, makes, moves or removes in the meantime."""
    written: set[str] = set()
    listening = [True]
    roots = tuple(f"{os.path.realpath(path)}{os.sep}" for path in allowed)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        for place in _changed(event, arguments) if listening else ():
            if not f"{place}{os.sep}".startswith(roots):
                written.add(place)

    sys.addaudithook(hear)
    try:
        yield written
    finally:
        listening.clear()


def _changed(event: str, arguments: tuple[Any, ...]) -> Iterator[str]:
    """The absolute paths that an audit event changes."""
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & _WRITING) if isinstance(flags, int) else bool(set(mode or "r") & set("wax+"))
        if writes and isinstance(path, (str, bytes, os.PathLike)):
            yield os.path.realpath(os.fsdecode(path))
    for index, folder in _PLACES.get(event, ()):
        if isinstance(path := arguments[index], (str, bytes, os.PathLike)):
            start = arguments[folder] if folder >= 0 else -1
            inside = f"/proc/self/fd/{start}" if isinstance(start, int) and start >= 0 else ""
            yield os.path.realpath(Path(inside, os.fsdecode(path)))


if __name__ == "__main__":
    main()

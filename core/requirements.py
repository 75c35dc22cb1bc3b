"""What a run needs of the machine, and the refusal, before anything is written, where that is not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from regraft.core.errors import ResourceError
from regraft.core.per_process import per_process
from regraft.core.plan import Plan

_CGROUP = Path("/sys/fs/cgroup")
_RECORDS_BYTES, _RECORD_BYTES_PER_TENSOR = 1 << 20, 512
"""Room for lock file, model card and the folders themselves; measured: 320 bytes of lock file for a tensor."""


def worker_count(threads: int) -> int:
    """The number of workers that `threads` asks for."""
    return threads if threads > 0 else min(4, len(os.sched_getaffinity(0)))


def check_resources(plan: Plan, target: Path, *, link: bool, world: int = 1, here: int = 1) -> None:
    """Refuse before anything is written when disk or memory is short.

    Args:
        plan: of the run.
        target: where the output goes.
        link: whether untouched files are linked.
        world: processes of the run.
        here: those of them whose memory is this machine's.

    Raises:
        ResourceError: with what is needed and what there is.
    """
    parent = next(folder for folder in target.resolve().parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free, disk_bytes(plan, link=link)
    if needed > free:
        raise ResourceError(
            "not enough disk space",
            where=target,
            expected=f"{needed} bytes free",
            found=f"{free} bytes",
            remedy="free some space, or choose another [output] path",
        )
    available = available_memory()
    needed = plan.memory_bytes if here == 1 else here * per_process(plan, world, link=link).memory_bytes
    if available is not None and needed > available:
        raise ResourceError(
            "not enough memory",
            where=plan.base.label,
            expected=f"{needed} bytes" if here == 1 else f"{needed} bytes for {here} processes",
            found=f"{available} bytes available",
            remedy=f"{_step_remedy(plan)}use fewer {'--threads' if here == 1 else 'processes'}, "
            "or a machine with more memory",
        )


def _step_remedy(plan: Plan) -> str:
    """What the step that needs most says of needing less."""
    steps = sorted(plan.steps, key=lambda step: step.outline.workspace_bytes)
    remedy = steps[-1].outline.memory_remedy if steps else ""
    return f"{remedy} in step {steps[-1].id}, " if remedy else ""


def disk_bytes(plan: Plan, *, link: bool) -> int:
    """Bytes of disk that the run needs at its peak: the whole output, less the shards that are linked, and what steps
    keep beside it, all of them until the end.
    """
    linked = sum(shard.nbytes for shard in plan.layout.shards if link and shard.source is not None)
    records = _RECORDS_BYTES + _RECORD_BYTES_PER_TENSOR * len(plan.result.tensors)
    return plan.output_bytes - linked + records + sum(step.outline.scratch_bytes for step in plan.steps)


def available_memory() -> int | None:
    """Bytes of memory that this process can still get, by system and control group; None if neither tells."""
    known = [count for count in (_of_the_system(), _of_the_group()) if count is not None]
    return min(known, default=None)


def _of_the_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_the_group() -> int | None:
    """What a container's limit leaves; pages of files that are not in use can be had back."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such group, or "max": no limit
        return None

"""What each process of a run needs, where torchrun starts several: bounds from headers alone, as the plan's.

Files are shared out as `core/together.py` does. Of a training, gradients, moments and averages of whole parameters are
shared out, and nothing else: every process loads the whole model, and holds it again when the shares are gathered at
the end. So more processes do not make a model fit whose fp32 weights are too large for one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from regraft.core.plan import TORCH_RSS_BYTES, Plan, memory_bound
from regraft.core.processes import torch_shares_out
from regraft.core.together import shares

RATE = 1e9
"""Bytes that a process writes in a second, unless said otherwise. On two quiet cores, page cache warm, copying makes
3 GB/s and a cast of every tensor 1.2 (docs/benchmarks.md); many disks and networks are slower than either."""


@dataclass(frozen=True)
class PerProcess:
    """What each of `world` processes needs at most.

    Args:
        world: how many.
        writing_bytes: memory for writing, of whoever needs most.
        step_bytes: memory that a step needs beside that, by its id.
        written_bytes: weight bytes that each process writes; linked ones are not written.
        rate: bytes a second, of one process.
    """

    world: int
    writing_bytes: int
    step_bytes: dict[str, int]
    written_bytes: tuple[int, ...]
    rate: float

    @property
    def memory_bytes(self) -> int:
        """Memory of one process at its peak."""
        return self.writing_bytes + max(self.step_bytes.values(), default=0)

    @property
    def writing_seconds(self) -> float:
        """Until the last process has written its files. What steps compute or train comes on top."""
        return max(self.written_bytes) / self.rate


def per_process(plan: Plan, world: int, *, link: bool = False, rate: float = RATE) -> PerProcess:
    """What each process needs for `plan`.

    Args:
        plan: of the recipe.
        world: number of processes.
        link: whether untouched files are linked.
        rate: bytes that a process writes in a second.
    """
    parts = shares(plan.layout.shards, world, link=link)
    tensors = [{tensor.spec.name: tensor for shard in part for tensor in shard.tensors} for part in parts]
    copied = [sum(shard.nbytes for shard in part if not (link and shard.source is not None)) for part in parts]
    sharing = torch_shares_out()
    shared = {step.id: step.outline.shared_bytes if sharing else 0 for step in plan.steps}
    least = TORCH_RSS_BYTES if world > 1 else 0  # they talk through torch, whatever they do
    return PerProcess(
        world,
        max(least, *(memory_bound(replace(plan.result, tensors=part), plan.threads) for part in tensors)),
        {step.id: step.outline.workspace_bytes - shared[step.id] + -(-shared[step.id] // world) for step in plan.steps},
        tuple(copied),
        rate,
    )

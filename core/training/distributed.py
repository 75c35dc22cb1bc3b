"""Several processes that train together: who they are, and what they exchange."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from regraft.core.errors import ResourceError, UsageError
from regraft.core.processes import processes, store

T = TypeVar("T")
Tensors = Mapping[str, torch.Tensor]

_TIMEOUT = timedelta(minutes=30)
"""For one exchange: long enough for the first process to save a large state meanwhile."""
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|socket|store", re.IGNORECASE)
_PLACE = re.compile(r"^\[[^]]*\] ")
"""Where in its own code a library was."""


@dataclass(frozen=True)
class Group:
    """The processes of a training. Every method is called by all of them, in the same order.

    Args:
        rank: this one.
        world: how many.
    """

    rank: int = 0
    world: int = 1

    def gather(self, value: T) -> list[T]:
        """Everybody's `value`, by rank."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        """The first one's `value`."""
        if self.world == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace `tensors`, of the same shapes everywhere, by their sums; the same bits everywhere."""
        if self.world > 1:
            from torch import distributed

            for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                if work is not None:
                    work.wait()

    def collect(self, tensors: Tensors) -> list[dict[str, torch.Tensor]]:
        """Everybody's `tensors` in the memory of the first one, by rank; nothing elsewhere."""
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.world == 1:
            return [own]
        from torch import distributed

        forms = self.gather(_forms(own))
        if self.rank > 0:
            for tensor in own.values():
                distributed.send(_bytes(tensor), 0)
            return []
        everybody = [own]
        for rank in range(1, self.world):
            everybody.append({name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms[rank].items()})
            for tensor in everybody[-1].values():
                distributed.recv(_bytes(tensor), rank)
        return everybody

    def hand_out(self, everybody: Sequence[Tensors]) -> dict[str, torch.Tensor]:
        """What the first one holds for this one: the reverse of `collect`; elsewhere `everybody` is not looked at."""
        if self.world == 1:
            return dict(everybody[0])
        from torch import distributed

        forms = self.share([_forms(tensors) for tensors in everybody])
        if self.rank == 0:
            for rank in range(1, self.world):
                for tensor in everybody[rank].values():
                    distributed.send(_bytes(tensor.contiguous()), rank)
            return dict(everybody[0])
        own = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms[self.rank].items()}
        for tensor in own.values():
            distributed.recv(_bytes(tensor), 0)
        return own


def _forms(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its memory: gloo does not know every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


def join(rank: int, world: int, device: torch.device) -> Group:
    """The group of this run's processes, made on the first call.

    Args:
        rank, world: of the batches, which must be shared among just these processes.
        device: that this one computes on.

    Raises:
        UsageError: the batches are shared among others.
        ResourceError: the others do not answer.
    """
    ours = processes()
    if (rank, world) != (ours.rank, ours.world):
        raise UsageError(
            "the batches are not shared among the processes of this run",
            where="world",
            expected=f"process {ours.rank} of {ours.world}",
            found=f"process {rank} of {world}",
            remedy="give the batches the rank and world of the run" if ours.world > 1 else "start it with torchrun",
        )
    if world > 1:
        _make_group(ours.rank, ours.world, device)
    return Group(rank, world)


def _make_group(rank: int, world: int, device: torch.device) -> None:
    from torch import distributed

    if distributed.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    own = distributed.distributed_c10d.PrefixStore("group", store())
    distributed.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=_TIMEOUT)


@contextmanager
def connected(world: int) -> Iterator[None]:
    """Turns what torch says of a lost connection into an error of ours.

    Raises:
        ResourceError: another process has ended, or has not answered for half an hour.
    """
    from torch import distributed

    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or (type(error) is RuntimeError and _LOST.search(str(error)))
        if world == 1 or not lost:
            raise
        raise ResourceError(
            "another process of this run has ended, or does not answer",
            where="torchrun",
            found=_PLACE.sub("", str(error).strip().splitlines()[0]).partition(". ")[0],
            remedy="look at its messages",
        ) from None

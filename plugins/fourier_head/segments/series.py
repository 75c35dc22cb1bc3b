"""Series of numbers out of data files, and the windows of them that are learnt or measured."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import FileRef
from regraft.core.data.load import files_of, read_rows
from regraft.core.data.rows import BadRows, Place, Row
from regraft.core.data.series import read_series as read_values
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError
from regraft.plugins.fourier_head.segments.params import SegmentSettings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Series:
    """One series, and when its numbers were.

    Args:
        values: in order.
        place: where it stands.
        start, step: of the first number, and seconds to the next; None without.
    """

    values: array[float]
    place: Place
    start: datetime | None = None
    step: float | None = None


def read_series(settings: SegmentSettings) -> tuple[list[Series], dict[str, str]]:
    """All series, and SHA-256 by the name of each file.

    Raises:
        InputError: a row is no series, has what is no finite number, or no date where stamps are asked for.
        UsageError: there is no such file, or no reader for it.
    """
    data = DataSettings(source=settings.data)
    read, _ = read_values(data, least=2, why="to learn one from the other")
    found = [Series(one.values, one.place) for one in read]
    if settings.stamps:
        rows = (row for source in settings.sources for row in read_rows(source, data, BadRows()))
        times = map(_times, rows)
        found = [replace(one, start=start, step=step) for one, (start, step) in zip(found, times, strict=True)]
    paths = [path for source in settings.sources for path in files_of(source)]
    return found, {path.name: FileRef(path=path).sha256() for path in paths}


def _times(row: Row) -> tuple[datetime, float]:
    start, step = row.values.get("start"), row.values.get("step")
    number = isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step) and step > 0
    try:
        first = datetime.fromisoformat(start) if isinstance(start, str) else None
    except ValueError:
        first = None
    if first is None or not number:
        raise InputError(
            "the row does not say when its numbers were", where=row.place,
            expected='"start", an ISO date such as "2016-07-01 00:00", and "step", seconds from one number to the next',
            found=f"start {start!r}, step {step!r}", remedy="add both, or set stamps = false",
        )  # fmt: skip
    assert step is not None
    return first.replace(tzinfo=None), float(step)


@dataclass(frozen=True)
class Window:
    """A context and the segment behind it: which series, and where it begins."""

    series: int
    start: int


def windows(series: Sequence[Series], settings: SegmentSettings) -> tuple[list[Window], list[Window]]:
    """Those to learn from, and those whose last segments fill the held-out end of each series.

    Raises:
        InputError: there are fewer than a batch takes.
    """
    whole, stride = settings.context + settings.length, settings.stride or settings.length
    learnt, held = list[Window](), list[Window]()
    for number, one in enumerate(series):
        size = len(one.values)
        kept = round(size * settings.held_out)
        learnt += [Window(number, start) for start in range(0, size - kept - whole + 1, stride)]
        first = size - kept - settings.context
        held += [Window(number, start) for start in range(max(first, 0), size - whole + 1, settings.length)]
    if len(learnt) < settings.batch_size:
        raise InputError(
            "there are fewer windows than a batch takes", where=f"segments.data: {', '.join(settings.sources)}",
            expected=f"at least {settings.batch_size} windows of {whole} numbers",
            found=f"{len(learnt)} in {len(series)} series, without the held-out ends",
            remedy="give more data, or lower batch_size, stride, context or held_out",
        )  # fmt: skip
    return learnt, held if settings.held_out else []


@dataclass(frozen=True)
class SegmentBatch:
    """Windows of B rows.

    Args:
        indices: which windows these are.
        segments: [B, n + 1, S], normalised by the mean and deviation of the first n of each row; fp32.
        stamps: [B, n, D], embeddings of the texts that say when the first n were; None without.
    """

    indices: tuple[int, ...]
    segments: torch.Tensor
    stamps: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Positions that the model computes."""
        return len(self.indices) * (self.segments.shape[1] - 1)


@dataclass(frozen=True)
class Windows:
    """The steps of a training over windows, each to be had by its number.

    Args:
        series: what they are windows of.
        windows: in order.
        settings: how they are gathered.
        seed: of the order.
        stamps: embeddings [D] by series and number of the segment's first value; empty without.
        digest: of the data.
        rank, world: this process and how many there are.
    """

    series: Sequence[Series]
    windows: Sequence[Window]
    settings: SegmentSettings
    seed: int
    stamps: dict[tuple[int, int], torch.Tensor]
    digest: str = ""
    rank: int = 0
    world: int = 1

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; a last batch that is not full is left out."""
        return len(self.windows) // self.settings.batch_size

    def __len__(self) -> int:
        """Number of steps."""
        return min(self.per_epoch * self.settings.epochs, self.settings.steps or 1 << 62)

    def units(self, step: int) -> int:
        """Numbers that a step predicts."""
        del step
        return self.settings.batch_size * self.settings.context

    def micro(self, step: int, device: str = "cpu") -> list[SegmentBatch]:
        """What this rank computes in a step, piece by piece."""
        epoch, number = divmod(step, self.per_epoch)
        order = _order(len(self.windows), self.seed, epoch)
        size = self.settings.batch_size
        own = order[number * size : (number + 1) * size][self.rank :: self.world]
        piece = self.settings.micro_batch or len(own) or 1
        return [self.gather(own[start : start + piece], device) for start in range(0, len(own), piece)]

    def gather(self, indices: Sequence[int], device: str = "cpu") -> SegmentBatch:
        """The tensors of some windows."""
        import torch

        length, count = self.settings.length, self.settings.count
        chosen = [self.windows[index] for index in indices]
        whole = self.settings.context + length
        rows = [torch.tensor(self.series[one.series].values[one.start : one.start + whole]) for one in chosen]
        values = torch.stack(rows).double()
        known = values[:, : self.settings.context]
        scale = (known.var(1, unbiased=False) + 1e-5).sqrt()[:, None]
        values = ((values - known.mean(1, keepdim=True)) / scale).float().view(len(chosen), count + 1, length)
        stamps = None
        if self.stamps:
            places = [[(one.series, one.start + k * length) for k in range(count)] for one in chosen]
            stamps = torch.stack([torch.stack([self.stamps[place] for place in row]) for row in places]).to(device)
        return SegmentBatch(tuple(indices), values.to(device), stamps)

    def places(self, indices: Sequence[int]) -> list[str]:
        """Where windows come from."""
        chosen = (self.windows[index] for index in indices)
        return [f"{self.series[one.series].place} from number {one.start + 1} on" for one in chosen]

    def identity(self) -> dict[str, Any]:
        """What decides the steps; JSON values."""
        given = self.settings.model_dump(mode="json", exclude={"data", "log", "tensorboard"})
        return {**given, "order_seed": self.seed, "world": self.world, "data": self.digest}


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)

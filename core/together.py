"""Writing by all processes of a run: each writes whole files, the first one learns what the others wrote.

A file is written by one process alone. Several machines that write into one file of a network file system can undo each
other's work, because their kernels write back whole pages; several processes of one machine gain nothing over the
writer's own workers. So an output of a single file is the first process's.

Files are shared out only if all processes would write the same: what a step holds in memory (trained weights, vectors
that were measured) is compared first. Where it differs, as it may on unlike processors, the first one writes alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.finite import NonFinite
from regraft.core.gguf.tensors import GgufFile
from regraft.core.layout import Layout, Shard
from regraft.core.operations import Operation
from regraft.core.processes import Processes, processes
from regraft.core.realised import Gauge
from regraft.core.tensors import LazyTensor, WeightFile
from regraft.core.writer import WriteOptions, Writer, WriteReport

if TYPE_CHECKING:
    from regraft.core.execute import Events

_COUNTS = ("copied_bytes", "computed_bytes", "linked_bytes")


def write_together(
    layout: Layout, folder: Path, options: WriteOptions, gauges: Mapping[str, Gauge], events: Events
) -> WriteReport:
    """Write this process's share of `layout`, all of it where there is one process.

    Args:
        layout: of the whole output.
        folder: where it is written, which all processes see.
        options: how.
        gauges: told by the writer what quantised weights keep; the first process's end with what all of them know.
        events: told of the progress, and where the first process must write alone.

    Returns:
        What was written: by all in the first process, by this one elsewhere.

    Raises:
        Ended: another process has failed.
        RegraftError: as `Writer.write`.
    """
    ours = processes()
    mine = layout if ours.world == 1 else Layout(tuple(_own_share(layout, ours, link=options.link, tell=events.say)))
    copied = [shard for shard in mine.shards if not _linked(shard, link=options.link)]
    events.start(sum(tensor.spec.nbytes for shard in copied for tensor in shard.tensors))
    others_are_well = ours.watch()

    def advance(nbytes: int) -> None:
        others_are_well()
        events.advance(nbytes)

    report = Writer(folder, options, advance).write(mine)
    if ours.world > 1:
        for told in ours.gather("written", _as_text(report, gauges))[1:]:
            _take(report, gauges, told)
        report.sort(layout)
    return report


def shares(shards: Sequence[Shard], world: int, *, link: bool) -> list[list[Shard]]:
    """The files of each process: the largest first, to whoever has the fewest bytes. What is linked is the first's."""
    parts: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for index in sorted(range(len(shards)), key=lambda index: -shards[index].nbytes):
        linked = _linked(shards[index], link=link)
        rank = 0 if linked else min(range(world), key=loads.__getitem__)
        parts[rank].append(index)
        loads[rank] += 0 if linked else shards[index].nbytes
    return [[shards[index] for index in sorted(part)] for part in parts]


def _linked(shard: Shard, *, link: bool) -> bool:
    return link and shard.source is not None


def _own_share(layout: Layout, ours: Processes, *, link: bool, tell: Callable[[str], None]) -> Sequence[Shard]:
    prints = ours.gather("content", fingerprint(layout))
    agreed = ours.share("agreed", "yes" if len(set(prints)) == 1 else "no") == "yes"
    if agreed:
        return shares(layout.shards, ours.world, link=link)[ours.rank]
    if not ours.first:
        return ()
    tell("the processes do not hold the same values, as may be on unlike machines: the first one writes alone")
    return layout.shards


def fingerprint(layout: Layout) -> str:
    """A digest of how every tensor is computed: names, formulas, where stored inputs stand, and values in memory."""
    teller = _Teller()
    for shard in layout.shards:
        teller.tell(shard.name)
        teller.tell(shard.tensors)
    return teller.hasher.hexdigest()


class _Teller:
    """Hashes objects by what they hold; one that it does not know gets a hash that no other process has."""

    def __init__(self) -> None:
        self.hasher = hashlib.sha256()
        self._known: dict[int, int] = {}

    def tell(self, value: Any) -> None:
        """Add `value`."""
        if isinstance(value, LazyTensor | Operation):
            self._object(value)
        elif is_dataclass(value) and not isinstance(value, type):
            self._fields(value)
        elif isinstance(value, Mapping):
            self._items("map", [part for item in value.items() for part in item])
        elif isinstance(value, tuple | list):
            self._items("list", value)
        elif isinstance(value, set | frozenset):
            self._items("set", sorted(value, key=repr))
        elif (torch := sys.modules.get("torch")) is not None and isinstance(value, torch.Tensor):
            self._add(f"{value.dtype} {tuple(value.shape)}")
            self.hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, WeightFile | GgufFile):
            self._add(value.path.name)
        elif isinstance(value, Path):
            self._add(value.name)
        elif value is None or isinstance(value, str | bytes | bool | int | float):
            self._add(repr(value))
        else:
            self._add(uuid.uuid4().hex)

    def _object(self, value: LazyTensor | Operation) -> None:
        """A tensor or an operation; the second time only that it comes again."""
        if (number := self._known.get(id(value))) is not None:
            self._add(f"again {number}")
            return
        self._known[id(value)] = len(self._known)
        raw = value.raw if isinstance(value, LazyTensor) else None
        if raw is not None and isinstance(value, LazyTensor):
            self._items("stored", (value.spec, raw.path.name, raw.offset))
        else:
            self._fields(value)

    def _fields(self, value: Any) -> None:
        names = [field.name for field in fields(value)] if is_dataclass(value) else list(vars(value))
        self._items(type(value).__qualname__, [part for name in names for part in (name, getattr(value, name))])

    def _items(self, kind: str, values: Sequence[Any]) -> None:
        self._add(f"{kind} {len(values)}")
        for value in values:
            self.tell(value)

    def _add(self, text: str) -> None:
        data = text.encode()
        self.hasher.update(len(data).to_bytes(8, "little") + data)


def _as_text(report: WriteReport, gauges: Mapping[str, Gauge]) -> str:
    return json.dumps(
        {
            "digests": report.digests,
            "inputs": report.input_digests,
            "counts": {name: getattr(report, name) for name in _COUNTS},
            "non_finite": {name: [count.nan, count.inf] for name, count in report.non_finite.items()},
            "gauges": {name: gauge.sums for name, gauge in gauges.items() if gauge.pieces},
        }
    )


def _take(report: WriteReport, gauges: Mapping[str, Gauge], told: str) -> None:
    """Add what another process tells of its part."""
    other = json.loads(told)
    report.digests |= other["digests"]
    report.input_digests |= other["inputs"]
    report.non_finite |= {name: NonFinite(*counts) for name, counts in other["non_finite"].items()}
    for name, count in other["counts"].items():
        setattr(report, name, getattr(report, name) + count)
    for name, sums in other["gauges"].items():
        gauges[name].pieces[0] = tuple(sums)

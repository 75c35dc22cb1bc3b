"""Which output tensor goes into which file, exact to the byte, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from regraft.core.checkpoint import Checkpoint
from regraft.core.header import render_header, render_tensor
from regraft.core.jsonio import dump
from regraft.core.sources.folder import INDEX, SINGLE
from regraft.core.specs import TensorSpec
from regraft.core.tensors import FileTensor, LazyTensor

METADATA = {"format": "pt"}
"""What transformers writes into the header of every file, and older readers ask for."""

_PADDING_BYTES = 7
"""A header ends at a multiple of 8."""


@dataclass(frozen=True)
class Shard:
    """One output file: its tensors in order, and the input file that it equals byte for byte, if there is one."""

    name: str
    tensors: tuple[LazyTensor, ...]
    source: Path | None = None

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file."""
        return render_header((tensor.spec for tensor in self.tensors), METADATA)

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        first = self.tensors[0].raw if self.source is not None else None
        return (first.offset if first else len(self.header)) + sum(tensor.spec.nbytes for tensor in self.tensors)

    def fits(self, shard_bytes: int) -> bool:
        """Whether the file is no larger than that, or holds a single tensor and cannot be smaller."""
        return len(self.tensors) <= 1 or self.nbytes <= shard_bytes

    def offsets(self) -> Iterable[tuple[LazyTensor, int]]:
        """Every tensor with the offset of its bytes in the file."""
        if self.source is not None:
            yield from ((tensor, tensor.raw.offset) for tensor in self.tensors if tensor.raw is not None)
            return
        offset = len(self.header)
        for tensor in self.tensors:
            yield tensor, offset
            offset += tensor.spec.nbytes


@dataclass(frozen=True)
class Layout:
    """All weight files of an output, and the index beside them."""

    shards: tuple[Shard, ...]

    @cached_property
    def index(self) -> bytes | None:
        """The index file, if there is more than one shard."""
        if len(self.shards) < 2:
            return None
        specs = [(tensor.spec, shard.name) for shard in self.shards for tensor in shard.tensors]
        weight_map = {spec.name: shard for spec, shard in sorted(specs, key=lambda item: item[0].name)}
        return dump({"metadata": {"total_size": sum(spec.nbytes for spec, _ in specs)}, "weight_map": weight_map})

    @property
    def files(self) -> dict[str, int]:
        """Size of every file in bytes, the index included."""
        sizes = {shard.name: shard.nbytes for shard in self.shards}
        return sizes if self.index is None else {**sizes, INDEX: len(self.index)}


def lay_out(checkpoint: Checkpoint, shard_bytes: int) -> Layout:
    """Spread the tensors of `checkpoint` over files of at most `shard_bytes`, header and all (a larger tensor gets a
    file of its own).

    The base's own shards are kept while all of them fit, so that an untouched one can be copied or linked whole.
    Otherwise tensors are packed in order.
    """
    kept = _shards(_base_groups(checkpoint))
    if kept and all(shard.fits(shard_bytes) for shard in kept):
        return Layout(kept)
    return Layout(_shards(_packed(checkpoint.tensors.values(), shard_bytes)))


def _shards(groups: list[list[LazyTensor]]) -> tuple[Shard, ...]:
    count = len(groups)
    names = (
        [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )
    return tuple(Shard(name, tuple(group), _same_file(group)) for name, group in zip(names, groups, strict=True))


def _base_groups(checkpoint: Checkpoint) -> list[list[LazyTensor]]:
    """The tensors by the base's files, added ones in the last; nothing where there are none."""
    if not checkpoint.shards:
        return []
    groups: dict[str, list[LazyTensor]] = {}
    last = list(checkpoint.shards.values())[-1]
    for name, tensor in checkpoint.tensors.items():
        groups.setdefault(checkpoint.shards.get(name, last), []).append(tensor)
    return list(groups.values())


def _packed(tensors: Iterable[LazyTensor], shard_bytes: int) -> list[list[LazyTensor]]:
    groups: list[list[LazyTensor]] = [[]]
    empty = len(render_header((), METADATA)) + _PADDING_BYTES
    header, data = empty, 0
    for tensor in tensors:
        entry, nbytes = len(render_tensor(tensor.spec, data)) + 1, tensor.spec.nbytes
        if groups[-1] and header + entry + data + nbytes > shard_bytes:
            groups.append([])
            header, data = empty, 0
            entry = len(render_tensor(tensor.spec, data)) + 1
        groups[-1].append(tensor)
        header, data = header + entry, data + nbytes
    return groups


def _same_file(group: list[LazyTensor]) -> Path | None:
    """The input file whose tensors, all of them and in this order, are this group."""
    stored = [tensor for tensor in group if isinstance(tensor, FileTensor)]
    if len(stored) < len(group) or not stored:
        return None
    file = stored[0].file
    same = list(file.header.entries) == [tensor.spec.name for tensor in stored] and all(t.file is file for t in stored)
    return file.path if same else None


def specs_of(layout: Layout) -> dict[str, TensorSpec]:
    """Every spec of the layout by name."""
    return {tensor.spec.name: tensor.spec for shard in layout.shards for tensor in shard.tensors}

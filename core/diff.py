"""How two checkpoints differ: tensors (streamed), config, tokenizer and other files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.jsonio import difference
from regraft.core.tensors import LazyTensor, row_chunks
from regraft.core.transfer import hash_range, new_hasher

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorChange:
    """How one tensor differs.

    Args:
        name: of the tensor.
        kind: `added`, `removed`, `reshaped`, `dtype` (another dtype), or `values`.
        before, after: dtype and shape on either side.
        max_abs: largest absolute difference of two elements; None where shapes differ.
        relative: Frobenius norm of the difference over that of `before`; None where shapes differ.
    """

    name: str
    kind: str
    before: str | None = None
    after: str | None = None
    max_abs: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class Difference:
    """Everything in which two checkpoints differ. True if they do."""

    tensors: tuple[TensorChange, ...] = ()
    equal_tensors: int = 0
    json: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.tensors or self.json or self.files)


def compare_checkpoints(
    before: Checkpoint, after: Checkpoint, *, ignore: frozenset[str] = frozenset(), threads: int = 2
) -> Difference:
    """Compare tensors element by element, JSON files key by key, other files byte by byte.

    Args:
        before: the first checkpoint.
        after: the second.
        ignore: names of files that are not compared.
        threads: tensors compared at a time.
    """
    names = list(dict.fromkeys([*before.tensors, *after.tensors]))
    with ThreadPoolExecutor(threads) as pool:
        changes = list(pool.map(lambda name: _tensor(name, before.tensors.get(name), after.tensors.get(name)), names))
    tensors = tuple(change for change in changes if change is not None)
    json, files = _files(before, after, ignore)
    return Difference(tensors, len(names) - len(tensors), json, files)


def _tensor(name: str, before: LazyTensor | None, after: LazyTensor | None) -> TensorChange | None:
    old, new = _describe(before), _describe(after)
    if before is None or after is None:
        return TensorChange(name, "added" if before is None else "removed", old, new)
    if before.spec.shape != after.spec.shape:
        return TensorChange(name, "reshaped", old, new)
    same_dtype = before.spec.dtype == after.spec.dtype
    if same_dtype and _bytes_digest(before) == _bytes_digest(after) is not None:
        return None
    max_abs, relative = _distance(before, after)
    if same_dtype and max_abs == 0:
        return None
    return TensorChange(name, "values" if same_dtype else "dtype", old, new, max_abs, relative)


def _describe(tensor: LazyTensor | None) -> str | None:
    return None if tensor is None else f"{tensor.spec.dtype} {list(tensor.spec.shape)}"


def _bytes_digest(tensor: LazyTensor) -> str | None:
    raw = tensor.raw
    if raw is None:
        return None
    hasher = new_hasher("xxh3")
    with raw.path.open("rb") as file:
        hash_range(file.fileno(), raw.offset, raw.nbytes, hasher)
    return hasher.hexdigest()


def _distance(before: LazyTensor, after: LazyTensor) -> tuple[float, float]:
    """(max |a - b|, |a - b| / |a|); NaN where the values are not comparable."""
    largest, squares, reference = 0.0, 0.0, 0.0
    for old, new in _rows(before, after):
        delta = (new - old).abs()
        if delta.numel():
            largest = max(largest, delta.max().item(), key=lambda value: math.inf if math.isnan(value) else value)
            squares += delta.square().sum().item()
            reference += old.square().sum().item()
    return largest, math.sqrt(squares / reference) if reference > 0 else (math.inf if squares else 0.0)


def _rows(before: LazyTensor, after: LazyTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    read_old, read_new = before.open(), after.open()
    local = before.row_local and after.row_local
    for start, stop in row_chunks(before.spec) if local else [(0, before.spec.rows)]:
        yield read_old(start, stop).double(), read_new(start, stop).double()


def _files(
    before: Checkpoint, after: Checkpoint, ignore: frozenset[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    json: dict[str, dict[str, Any]] = {}
    files: dict[str, str] = {}
    for name in sorted({*before.files, *after.files} - ignore):
        old, new = before.files.get(name), after.files.get(name)
        if old is None or new is None:
            files[name] = "added" if old is None else "removed"
        elif old.read() == new.read():
            continue
        elif name.endswith(".json") and "/" not in name and not name.startswith(("tokenizer.json", "vocab")):
            if change := difference(before.json(name), after.json(name)):
                json[name] = change
        else:
            files[name] = "changed"
    return json, files

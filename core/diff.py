"""How two checkpoints differ: tensors (streamed), config, tokenizer and other files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.core.buffers import reading
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError
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
    before: Checkpoint,
    after: Checkpoint,
    *,
    ignore: frozenset[str] = frozenset(),
    known_equal: frozenset[str] = frozenset(),
    threads: int = 2,
) -> Difference:
    """Compare tensors element by element, JSON files key by key, other files byte by byte.

    Args:
        before: the first checkpoint.
        after: the second.
        ignore: names of files that are not compared.
        known_equal: names of tensors that somebody else vouches for, and that are not read.
        threads: tensors compared at a time.
    """
    names = list(dict.fromkeys([*before.tensors, *after.tensors]))
    read = [name for name in names if name not in known_equal]
    with ThreadPoolExecutor(threads) as pool:
        changes = list(pool.map(lambda name: _tensor(name, before.tensors.get(name), after.tensors.get(name)), read))
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
    equal, max_abs, relative = _distance(before, after)
    if same_dtype and equal:
        return None
    return TensorChange(name, "values" if same_dtype else "dtype", old, new, max_abs, relative)


def _describe(tensor: LazyTensor | None) -> str | None:
    return None if tensor is None else f"{tensor.spec.dtype} {list(tensor.spec.shape)}"


def _bytes_digest(tensor: LazyTensor) -> str | None:
    raw = tensor.raw
    if raw is None:
        return None
    hasher = new_hasher("xxh3")
    with reading(raw.path) as descriptor:
        hash_range(descriptor, raw.offset, raw.nbytes, hasher, where=raw.path)
    return hasher.hexdigest()


def _distance(before: LazyTensor, after: LazyTensor) -> tuple[bool, float, float]:
    """(all equal, max |a - b|, |a - b| / |a|); NaN where the values are not comparable.

    Equality is told in the tensors' own dtype, because float64 cannot tell large integers apart; 0.0 equals -0.0.
    """
    import torch

    equal, largest, squares, reference = True, 0.0, 0.0, 0.0
    for old, new in _rows(before, after):
        if torch.equal(old, new):
            reference += _wide(old).abs().square().sum().item()
            continue
        equal = False
        delta = (_wide(new) - _wide(old)).abs()
        largest = max(largest, delta.max().item(), key=lambda value: math.inf if math.isnan(value) else value)
        squares += delta.square().sum().item()
        reference += _wide(old).abs().square().sum().item()
    return equal, largest, math.sqrt(squares / reference) if reference > 0 else (math.inf if squares else 0.0)


def _wide(rows: torch.Tensor) -> torch.Tensor:
    import torch

    return rows.to(torch.complex128 if rows.is_complex() else torch.float64)


def _rows(before: LazyTensor, after: LazyTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same rows of both, in one dtype if they have one, else in float64."""
    read_old, read_new = before.open(), after.open()
    local = before.row_local and after.row_local
    for start, stop in row_chunks(before.spec) if local else [(0, before.spec.rows)]:
        old, new = read_old(start, stop), read_new(start, stop)
        yield (old, new) if old.dtype == new.dtype and old.element_size() > 1 else (_wide(old), _wide(new))


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
        elif (change := _json_change(name, before, after)) is None:
            files[name] = "changed"
        elif change:
            json[name] = change
    return json, files


def _json_change(name: str, before: Checkpoint, after: Checkpoint) -> dict[str, Any] | None:
    """How a JSON file has changed, key by key; None where it is not to be shown that way, or is no object."""
    if not name.endswith(".json") or "/" in name or name.startswith(("tokenizer.json", "vocab")):
        return None
    try:
        return difference(before.json(name), after.json(name))
    except InputError:
        return None

"""What has become of the tensors: measured, or told by the lock file; as counts, rows and a heat map."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regraft.core.derived import open_rows
from regraft.core.diff import Difference, TensorChange
from regraft.core.lock_file import Lock
from regraft.core.report.heat_map import Cell, HeatMap, heat_map
from regraft.core.report.numbers import number
from regraft.core.report.places import Place
from regraft.core.tensors import LazyTensor, row_chunks

MEASURED = "Relative change ‖W′ − W‖ / ‖W‖ of each weight (Frobenius norm)"
"""Title of a map of measured changes."""

LISTED = 200
"""Tensors that a page names; the largest changes first."""

_GLYPHS = {"copied": "", "rewritten": "•", "added": "+", "zeros": "0", "removed": "−", "reshaped": "≠", "dtype": "t",
           "zero": "∞", "unknown": "?"}  # fmt: skip
_WORDS = {
    "copied": "unchanged",
    "rewritten": "rewritten",
    "added": "added",
    "zeros": "added, all zeros",
    "removed": "dropped",
    "reshaped": "reshaped",
    "dtype": "in another dtype, with the same values",
    "zero": "changed from zeros, or not finite",
    "unknown": "no digest was taken",
}
_ORDER = {
    kind: at
    for at, kind in enumerate(("unknown", "copied", "dtype", "rewritten", "zeros", "added", "removed", "reshaped"))
}


@dataclass(frozen=True)
class Change:
    """What has become of one tensor.

    Args:
        name: of the tensor.
        kind: `copied`, `rewritten`, `added`, `zeros` (added, and nothing but zeros), `removed`, `reshaped`, `dtype` or
            `unknown`.
        before, after: dtype and shape, where there is one and it is known.
        relative: ‖W' − W‖ / ‖W‖; None where it is not measured.
        max_abs: largest absolute difference; None where it is not measured.
    """

    name: str
    kind: str
    before: str | None = None
    after: str | None = None
    relative: float | None = None
    max_abs: float | None = None


def from_difference(found: Difference, names: Sequence[str], after: Mapping[str, LazyTensor]) -> list[Change]:
    """What a comparison has measured.

    Args:
        found: by `compare_checkpoints`.
        names: of all tensors on either side.
        after: tensors of the later side, of which those added are read to the first number that is not zero.
    """
    changed = {change.name: _measured(change, after) for change in found.tensors}
    return [changed.get(name, Change(name, "copied")) for name in names]


def _measured(change: TensorChange, after: Mapping[str, LazyTensor]) -> Change:
    kind = {"values": "rewritten"}.get(change.kind, change.kind)
    if change.kind == "dtype" and change.relative != 0:
        kind = "rewritten"
    elif change.kind == "added" and _all_zeros(after[change.name]):
        kind = "zeros"
    return Change(change.name, kind, change.before, change.after, change.relative, change.max_abs)


def _all_zeros(tensor: LazyTensor) -> bool:
    read = open_rows(tensor, "cpu")
    return not any(read(start, stop).any() for start, stop in row_chunks(tensor.spec))


def from_lock(lock: Lock) -> list[Change]:
    """What the digests of a lock file tell, without the base. What was dropped, they do not."""
    given = set(lock.base.tensors.values())
    changes = []
    for name, tensor in lock.output.tensors.items():
        if tensor.digest is None:
            kind = "unknown"
        elif tensor.digest in given:
            kind = "copied"
        else:
            kind = "rewritten" if name in lock.base.tensors else "added"
        changes.append(Change(name, kind, after=f"{tensor.dtype} {list(tensor.shape)}"))
    return changes


def counted(changes: Sequence[Change], sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Words, number and bytes of each kind of change that occurs.

    Args:
        changes: of all tensors.
        sizes: bytes of each, after the change where it is still there.
    """
    numbers = Counter(change.kind for change in changes)
    return [
        (words, numbers[kind], sum(sizes.get(change.name, 0) for change in changes if change.kind == kind))
        for kind, words in _WORDS.items()
        if numbers[kind]
    ]


def listed(changes: Sequence[Change]) -> tuple[list[Change], int]:
    """Changed tensors, the largest change first, and how many more there are."""
    changed = [change for change in changes if change.kind not in ("copied", "unknown")]
    changed.sort(key=lambda change: -_size(change))
    return changed[:LISTED], max(0, len(changed) - LISTED)


def _size(change: Change) -> float:
    if change.relative is None:
        return math.inf if change.kind != "rewritten" else 0.0
    return math.inf if math.isnan(change.relative) else change.relative


def change_map(changes: Sequence[Change], places: Mapping[str, Place], *, title: str) -> HeatMap | None:
    """Rows: roles; columns: layers. Where several tensors share a cell, the largest change is shown. None
    where no layer has changed.

    Vectors (norms, biases) that are nowhere changed have no row.

    Args:
        changes: of all tensors.
        places: of the tensors, in the order of the rows.
        title: of a map without a measured change.
    """
    by_name = {change.name: change for change in changes}
    grouped: dict[tuple[str, int], list[Change]] = {}
    vectors: dict[str, bool] = {}
    for name, place in places.items():
        if place.layer is not None and name in by_name:
            grouped.setdefault((place.role, place.layer), []).append(by_name[name])
            vectors[place.role] = place.vector
    same = ("copied", "unknown")
    moved = {role for (role, _), group in grouped.items() if any(change.kind not in same for change in group)}
    rows = [role for role, vector in vectors.items() if role in moved or not vector]
    cells = {place: _cell(group) for place, group in grouped.items() if place[0] in rows}
    if not moved:
        return None
    sized = any(cell.value is not None for cell in cells.values())
    return heat_map(
        cells, title=MEASURED if sized else title, rows=rows, columns=1 + max(layer for _, layer in cells),
        row_name="role", column_name="layer", log=True, kinds={f"k-{kind}": words for kind, words in _WORDS.items()},
    )  # fmt: skip


def _cell(group: Sequence[Change]) -> Cell:
    several = f" (the largest of {len(group)} tensors)" if len(group) > 1 else ""
    measured = [change.relative for change in group if change.kind == "rewritten" and change.relative is not None]
    finite = [size for size in measured if 0 < size < math.inf]
    worst = max(group, key=lambda change: _ORDER[change.kind])
    if _ORDER[worst.kind] > _ORDER["rewritten"] or not measured:
        return Cell(_WORDS[worst.kind], css=f"k-{worst.kind}", glyph=_GLYPHS[worst.kind])
    if len(finite) < len(measured):
        return Cell(_WORDS["zero"] + several, css="k-zero", glyph=_GLYPHS["zero"])
    return Cell(number(max(finite)) + several, value=max(finite))

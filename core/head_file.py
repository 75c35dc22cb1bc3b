"""heads.json: which attention heads a method chose, and the scores it chose them by. Light: read at plan time.

    {
      "site": "head",                      "head", or "kv-group": numbers count key-value heads
      "heads": [[12, 3], [14, 0]],         layer and head, both from 0, the best first
      "scoring": "scale",                  how the scores came about
      "num_layers": 30, "num_heads": 9,    of the model they were chosen in
      "scores": [[null, ...], [0.1, ...]]  by layer and head; null where none was computed
    }

Only `heads` must be there, so that such a file is easily written by hand.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regraft.core.errors import InputError, UsageError
from regraft.core.jsonio import brief, dump, read_object

Head = tuple[int, int]
"""Layer and head, both counted from 0."""

_REMEDY = 'write {"heads": [[layer, head], ...]}, or take the heads.json of a lofit step'


@dataclass(frozen=True)
class HeadFile:
    """The contents of a heads.json.

    Args:
        heads: those chosen, the best first.
        site: `head`, or `kv-group` where they are key-value heads.
        scoring: how the scores came about.
        num_layers, num_heads: of the model; `num_heads` counts what `site` says.
        scores: by layer and head; None where none was computed.
    """

    heads: tuple[Head, ...]
    site: Literal["head", "kv-group"] = "head"
    scoring: str = ""
    num_layers: int | None = None
    num_heads: int | None = None
    scores: Sequence[Sequence[float | None]] = ()

    def as_bytes(self) -> bytes:
        """The file; the same contents give the same bytes. Scores have nine digits, which tell fp32 numbers apart."""
        facts: dict[str, Any] = {"site": self.site, "heads": [list(head) for head in self.heads]}
        facts |= {"scoring": self.scoring} if self.scoring else {}
        facts |= {} if self.num_layers is None else {"num_layers": self.num_layers}
        facts |= {} if self.num_heads is None else {"num_heads": self.num_heads}
        if self.scores:
            facts["scores"] = [
                [None if one is None or not math.isfinite(one) else float(f"{one:.9g}") for one in row]
                for row in self.scores
            ]
        return dump(facts)


def read_head_file(path: Path, *, site: str | None = None) -> HeadFile:
    """The contents of the file `path`.

    Raises:
        InputError: it cannot be read, is no such file, names a head twice or none at all; or its heads are of another
            kind than `site`.
    """
    if not path.is_file():
        raise InputError("there is no such file of heads", where=path, expected="a heads.json",
                         remedy="check the path, which starts at the recipe's folder")  # fmt: skip
    facts = read_object(path)
    own = facts.get("site", "head")
    if own not in ("head", "kv-group"):
        raise InputError("heads of no known kind", where=f"{path}: site", expected="head or kv-group",
                         found=brief(own), remedy=_REMEDY)  # fmt: skip
    if site is not None and own != site:
        raise InputError("the heads are of another kind", where=f"{path}: site", expected=site, found=own,
                         remedy="choose them anew with the site that is wanted")  # fmt: skip
    scoring = facts.get("scoring", "")
    return HeadFile(
        _heads(path, facts.get("heads")),
        own,
        scoring if isinstance(scoring, str) else "",
        _count(path, facts, "num_layers"),
        _count(path, facts, "num_heads"),
        _scores(path, facts.get("scores", [])),
    )


def check_heads(heads: Collection[Head], num_layers: int, num_heads: int, *, where: object) -> None:
    """Refuse heads that a model does not have.

    Raises:
        UsageError: a layer or a head is out of range.
    """
    for layer, head in heads:
        if not 0 <= layer < num_layers or not 0 <= head < num_heads:
            raise UsageError(
                f"there is no head {head} of layer {layer}",
                where=where,
                expected=f"layers 0 to {num_layers - 1}, heads 0 to {num_heads - 1}",
                found=[layer, head],
                remedy="use heads that were chosen in this model; layers and heads count from 0",
            )


def read_heads_of(path: Path, num_layers: int, num_heads: int, *, site: str = "head") -> HeadFile:
    """The contents of the file `path`, chosen in a model of so many layers and heads, as far as it says.

    Raises:
        InputError: as `read_head_file`.
        UsageError: it was chosen in a model of another shape; as `check_heads`.
    """
    file = read_head_file(path, site=site)
    chosen_in = (file.num_layers or num_layers, file.num_heads or num_heads)
    if chosen_in != (num_layers, num_heads):
        raise UsageError(
            "the heads were chosen in a model of another shape",
            where=path,
            expected=f"{num_layers} layers of {num_heads} heads",
            found=f"{chosen_in[0]} layers of {chosen_in[1]} heads",
            remedy="choose them in this model, or correct num_layers and num_heads if it is this one",
        )
    check_heads(file.heads, num_layers, num_heads, where=f"{path}: heads")
    return file


def _heads(path: Path, value: Any) -> tuple[Head, ...]:
    where = f"{path}: heads"
    if not isinstance(value, list) or not value:
        raise InputError("the file names no heads", where=where, expected="a list of [layer, head]",
                         found=brief(value), remedy=_REMEDY)  # fmt: skip
    heads: dict[Head, None] = {}
    for number, one in enumerate(value):
        if not (isinstance(one, list) and len(one) == 2 and all(_whole(part) for part in one)):
            raise InputError("is no layer and head", where=f"{where}[{number}]", expected="[layer, head], from 0",
                             found=brief(one), remedy=_REMEDY)  # fmt: skip
        head = (one[0], one[1])
        if head in heads:
            raise InputError("a head is named twice", where=f"{where}[{number}]", found=one, remedy="name it once")
        heads[head] = None
    return tuple(heads)


def _count(path: Path, facts: dict[str, Any], key: str) -> int | None:
    value = facts.get(key)
    if value is not None and not (_whole(value) and value > 0):
        raise InputError("is no count", where=f"{path}: {key}", expected="a whole number above 0", found=brief(value),
                         remedy="correct it, or leave it out")  # fmt: skip
    return value


def _scores(path: Path, value: Any) -> tuple[tuple[float | None, ...], ...]:
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, list) and all(one is None or _number(one) for one in row) for row in rows):
        raise InputError("are no scores", where=f"{path}: scores", expected="a list of numbers or null for each layer",
                         found=brief(value), remedy="correct them, or leave them out")  # fmt: skip
    return tuple(tuple(row) for row in rows)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)

"""From module paths, as adapters name them, to the tensors of a checkpoint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import lru_cache

from regraft.core.architectures.family import Part
from regraft.core.architectures.layout import OUTSIDE, Layout
from regraft.core.architectures.slot import Slot
from regraft.core.errors import InputError

_REMEDY = "use an adapter that was made for this model"


def slot_of_module(layout: Layout, path: str, num_experts: int) -> Slot:
    """The slot of a whole module; see `Architecture.slot_of_module`."""
    for part, layer, expert in _readings(layout, path):
        if part.parameter or (expert is not None and expert >= num_experts):
            continue
        slot = _slot(layout, part, layer, expert)
        if slot is not None and (not layout.stored or slot.tensor in layout.stored):
            return slot
    raise InputError(
        "the model has no such module, or no tensor for it alone",
        where=path,
        expected=f"a module of {layout.family.label}",
        found=_nearest(layout, path),
        remedy=_REMEDY,
    )


def expert_tensors(layout: Layout, path: str) -> tuple[int, tuple[str, ...]]:
    """Layer and roles of a parameter that the stock class stacks over experts; see `Architecture.expert_tensors`.

    Answers for checkpoints that hold the experts one by one as well.
    """
    for part, layer, _ in _readings(layout, path):
        if part.parameter and any("router" in one.role_names() for one in layout.present(layer)):
            return layer, part.role_names()
    raise InputError(
        "the model has no such stacked parameter",
        where=path,
        expected=f"a parameter of {layout.family.label} that stacks its experts",
        remedy=_REMEDY,
    )


def _slot(layout: Layout, part: Part, layer: int, expert: int | None) -> Slot | None:
    """The part's slot, or an expert's share of the stack where the checkpoint stacks them; None if it has neither."""
    present = list(layout.present(layer))
    if any(part is one for one in present):
        return layout.slot(part, layer, expert)
    roles = part.role_names()
    stacks = [one for one in present if one.experts is not None and roles[0] in one.role_names()]
    return layout.slot(stacks[0], layer, expert, roles[0]) if part.per_expert and stacks else None


def _readings(layout: Layout, path: str) -> Iterator[tuple[Part, int, int | None]]:
    """Parts that the path may mean, with layer and expert: as it is, or behind one of the base model's names."""
    candidates = [(path, True)]
    candidates += [(path.removeprefix(prefix), False) for prefix in layout.family.prefixes() if path.startswith(prefix)]
    for relative, outside in candidates:
        for part in layout.family.parts:
            numbers = _match(part, relative) if part.outside == outside else None
            if numbers is not None and numbers[0] < layout.size("num_hidden_layers"):
                yield part, *numbers


def _match(part: Part, path: str) -> tuple[int, int | None] | None:
    """Layer and expert if `path` is one of the part's spellings."""
    for spelling in (part.path, *part.stored):
        if found := _pattern(spelling).fullmatch(path):
            groups = found.groupdict()
            expert = groups.get("expert")
            return int(groups.get("layer", OUTSIDE)), None if expert is None else int(expert)
    return None


@lru_cache(maxsize=1024)
def _pattern(spelling: str) -> re.Pattern[str]:
    escaped = re.escape(spelling)
    return re.compile(escaped.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)"))


def _nearest(layout: Layout, path: str) -> str | None:
    modules = {layout.module(part, 0) for part in layout.family.parts if not part.parameter} - {None}
    close = difflib.get_close_matches(re.sub(r"\.\d+\.", ".0.", path), sorted(filter(None, modules)), n=1)
    return f"nothing of that name; the nearest is {close[0]}" if close else None

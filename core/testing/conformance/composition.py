"""Checks that a transformation stacks: before and behind other steps, and as a saved patch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.core.errors import RegraftError, UsageError
from regraft.core.plan import BASE_CARD
from regraft.core.sources import open_checkpoint
from regraft.core.sources.folder import CARD, LOCK
from regraft.core.testing.checkpoints import tree
from regraft.core.testing.conformance.check import NotApplicable, demand, named
from regraft.core.testing.conformance.subject import Subject, refuses_well
from regraft.core.testing.running import apply_recipe, host_of

Steps = tuple[Mapping[str, Any], ...]


def composes_before_others(subject: Subject) -> None:
    """This step and then a first-party one, in one recipe, give the bytes of two recipes."""
    _compose(subject, first=True)


def composes_behind_others(subject: Subject) -> None:
    """A first-party step and then this one, in one recipe, give the bytes of two recipes."""
    _compose(subject, first=False)


def applies_as_a_saved_patch(subject: Subject) -> None:
    """The patch of `--save-patches`, applied by the step `patch`, gives the same bytes."""
    case, folder = subject.case(), subject.place("patches")
    saved = subject.apply(case, save_patches=folder)
    again = subject.place("output")
    apply_recipe(case.base, {"use": "patch", "path": folder / "step.regraft"}, to=again)
    _same(saved.folder, again, "the saved patch",
          remedy="keep in an operation what its formula needs, or give it no `kind`")  # fmt: skip


def _compose(subject: Subject, *, first: bool) -> None:
    case, refused = subject.case(), []
    for name in subject.neighbours:
        if name == subject.kind.name:
            continue
        inputs = subject.place("inputs")
        inputs.mkdir(parents=True)
        other = _neighbour(name, case.base, inputs)
        steps: Steps = (subject.step(case), other) if first else (other, subject.step(case))
        if (fused := _applied(subject, case.base, steps)) is None:
            refused.append(name)
            continue
        middle = _applied(subject, case.base, steps[:1])
        after = _applied(subject, middle, steps[1:]) if middle else None
        if after is None:
            refused.append(name)
            continue
        _same(after, fused, f"{'before' if first else 'behind'} {name}",
              remedy="read tensors through the checkpoint that the step is given, and plan from its specs")  # fmt: skip
    if len(refused) == len([name for name in subject.neighbours if name != subject.kind.name]):
        raise NotApplicable(f"refused beside {', '.join(refused)}" if refused else "no neighbours are named")


def _neighbour(name: str, base: Path, inputs: Path) -> dict[str, Any]:
    """The step `name` with its example parameters for `base`.

    Raises:
        UsageError: no such transformation is installed.
    """
    installed = host_of().transformations()
    if name not in installed:
        raise UsageError("no such neighbour", where="neighbours", found=name,
                         expected=f"one of {', '.join(sorted(installed))}", remedy="name one of these")  # fmt: skip
    return {"use": name, "id": "neighbour", **installed[name].example(open_checkpoint(str(base)), inputs)}


def _applied(subject: Subject, base: Path, steps: Steps) -> Path | None:
    """What the steps make of `base`; None if one of them refuses."""
    output = subject.place("output")
    try:
        apply_recipe(base, *steps, to=output)
    except RegraftError as error:
        if not refuses_well(error):
            raise
        return None
    return output


def _same(one: Path, other: Path, where: str, *, remedy: str) -> None:
    """Weights and files are the same, but for what records the run."""
    first, second = _files(one), _files(other)
    differing = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    demand(not differing, "one recipe and two give different bytes", where=where, found=named(differing), remedy=remedy)


def _files(folder: Path) -> dict[str, str]:
    records = (CARD, LOCK, BASE_CARD, "regraft")
    return {name: digest for name, digest in tree(folder).items() if name.split("/")[0] not in records}

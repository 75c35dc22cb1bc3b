"""Checks that what cannot be done is refused with a reason and a remedy, and never ends in another exception."""

from __future__ import annotations

from dataclasses import replace

from regraft.core.checkpoint import CONFIG, Checkpoint, FileRef
from regraft.core.errors import RegraftError
from regraft.core.jsonio import dump
from regraft.core.patch import Renamed, overlay
from regraft.core.sources import open_checkpoint
from regraft.core.tensors import MemoryTensor
from regraft.core.testing.conformance.check import NotApplicable
from regraft.core.testing.conformance.subject import Case, Subject, unless_refused
from regraft.core.transformation import Run

_MOST = 4
"""Tensors that are taken away, one after another."""


def refuses_unknown_architectures(subject: Subject) -> None:
    """A model of a family that nobody knows is refused with a remedy, or rewritten; nothing else happens."""
    case = subject.case()
    base = open_checkpoint(str(case.base))
    config = {**base.config, "model_type": "no_such_family", "architectures": ["NoSuchForCausalLM"]}
    tensors = {
        f"strange.{index}": Renamed(f"strange.{index}", tensor) for index, tensor in enumerate(base.tensors.values())
    }
    files = {**base.files, CONFIG: FileRef(data=dump(config))}
    _try(subject, case, replace(base, tensors=tensors, shards={}, files=files), "a model of an unknown family")


def refuses_missing_tensors(subject: Subject) -> None:
    """A base that lacks a tensor which the plan rewrites is refused with a remedy, or rewritten without it."""
    case = subject.case()
    base, planned = _rewritten(subject, case)
    step = max(1, len(planned) // _MOST)
    for name in planned[::step][:_MOST]:
        tensors = {key: tensor for key, tensor in base.tensors.items() if key != name}
        _try(subject, case, replace(base, tensors=tensors), f"a base without {name}")


def refuses_misshapen_tensors(subject: Subject) -> None:
    """A base in which a tensor that the plan rewrites has half its rows is refused, or rewritten in that shape."""
    case = subject.case()
    base, planned = _rewritten(subject, case)
    for name in planned[:1]:
        half = MemoryTensor(name, base.load(name)[: base.specs[name].rows // 2])
        _try(subject, case, replace(base, tensors={**base.tensors, name: half}), f"half of {name}")


def _rewritten(subject: Subject, case: Case) -> tuple[Checkpoint, list[str]]:
    """The base, and the tensors of it that the plan rewrites.

    Raises:
        NotApplicable: it rewrites none.
    """
    base = open_checkpoint(str(case.base))
    specs = subject.kind().plan(base, subject.validated(case)).specs
    planned = [name for name in specs if name in base.tensors]
    if not planned:
        raise NotApplicable("it rewrites no tensor")
    return base, planned


def _run(subject: Subject) -> Run:
    cache = subject.place("cache")
    cache.mkdir()
    return Run("step", cache=cache, state=subject.place("state"))


def _try(subject: Subject, case: Case, checkpoint: Checkpoint, what: str) -> None:
    """Check, plan and apply on `checkpoint`, and compute every tensor that comes out.

    Raises:
        VerificationError: refused in the wrong way.
    """
    params, made = subject.validated(case), subject.kind()
    try:
        made.check(checkpoint, params)
        made.plan(checkpoint, params)
        patch = made.apply(checkpoint, params, _run(subject))
        above = overlay(checkpoint, patch, by="step")
        for name in patch.edits:
            above.load(name)
    except RegraftError as error:
        unless_refused(error, what)

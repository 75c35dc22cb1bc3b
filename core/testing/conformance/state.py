"""Checks that a transformation depends on nothing but its arguments, and leaves nothing behind."""

from __future__ import annotations

import random
from typing import Any

from regraft.core.sources import open_checkpoint
from regraft.core.testing.checkpoints import read_tensors, same_bits
from regraft.core.testing.conformance.check import demand, named
from regraft.core.testing.conformance.processes import probed
from regraft.core.testing.conformance.subject import Case, Subject
from regraft.core.transformation import Run


def takes_its_seed_from_the_run(subject: Subject) -> None:
    """Whatever the state of the global random generators, the bytes are the same."""
    import numpy
    import torch

    outputs = []
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        for seed in (1, 2):
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            outputs.append(read_tensors(subject.apply(subject.case()).folder))
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
    differing = [name for name in outputs[0] if not same_bits({"x": outputs[0][name]}, {"x": outputs[1][name]})]
    demand(not differing, "the bytes depend on global random generators", found=named(differing),
           remedy="draw from torch.Generator().manual_seed(run.seed_for(name))")  # fmt: skip


def leaves_the_process_alone(subject: Subject) -> None:
    """After a step the current folder, the environment, and torch's settings and generators are what they were."""
    for one in probed(subject):
        changed = one.part("applied")["changed"]
        demand(not changed, "the step has changed settings of the process", found=named(changed),
               remedy="change no global settings: later steps run in the same process")  # fmt: skip


def keeps_nothing_between_steps(subject: Subject) -> None:
    """One instance used on another model in between gives the same plan and the same tensors again."""
    first, other = subject.case(), subject.case(seed=1)
    made = subject.kind()
    before = _result(subject, made, first)
    _result(subject, made, other)
    after = _result(subject, made, first)
    demand(before[0] == after[0], "the plan depends on what was done before", where=subject.kind.name,
           remedy="keep nothing on the class, the instance or the module")  # fmt: skip
    demand(same_bits(before[1], after[1]), "the tensors depend on what was done before", where=subject.kind.name,
           remedy="keep nothing on the class, the instance or the module")  # fmt: skip


def _result(subject: Subject, made: Any, case: Case) -> tuple[Any, dict[str, Any]]:
    from regraft.core.patch import overlay

    checkpoint, params = open_checkpoint(str(case.base)), subject.validated(case)
    made.check(checkpoint, params)
    outline = made.plan(checkpoint, params)
    cache = subject.place("cache")
    cache.mkdir()
    patch = made.apply(checkpoint, params, Run("step", cache=cache, state=subject.place("state")))
    above = overlay(checkpoint, patch, by="step")
    return outline, {name: above.load(name).clone() for name in patch.edits}

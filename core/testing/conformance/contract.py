"""Checks of what a transformation says of itself, of its parameters, and of its plan."""

from __future__ import annotations

import json
import re

from pydantic import BaseModel, ValidationError

from regraft.core.errors import RecipeError, VerificationError
from regraft.core.recipe.model import recorded
from regraft.core.recipe.overrides import TOP_LEVEL
from regraft.core.sources import open_checkpoint
from regraft.core.sources.folder import CARD, LOCK
from regraft.core.testing.conformance.check import demand, named
from regraft.core.testing.conformance.subject import Subject
from regraft.core.testing.running import make_recipe

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def has_an_example(subject: Subject) -> None:
    """Its example parameters are valid, and it accepts the families that it is tried on."""
    for family in subject.families:
        refusal = subject.refusal(subject.case(family))
        found = None if refusal is None else f"{refusal.message}: {refusal.found}"
        demand(refusal is None, "it refuses a family that it is said to support", where=family, found=found,
               remedy="give parameters that fit (`params`, or `example`), or name other `families`")  # fmt: skip


def describes_itself(subject: Subject) -> None:
    """It has a name for recipes, a summary of one sentence, a version, and a description of every parameter."""
    kind = subject.kind
    demand(
        _NAME.fullmatch(kind.name) is not None, "the name is not one for recipes", where=f"{kind.__name__}.name",
        expected="lower-case words with hyphens", found=kind.name, remedy="name it like `scale-layers`",
    )  # fmt: skip
    demand(
        kind.name not in TOP_LEVEL, "the name is a key of recipes, so a step of that name needs an id",
        where=f"{kind.__name__}.name", expected=f"none of {', '.join(TOP_LEVEL)}", found=kind.name,
        remedy="choose another name",
    )  # fmt: skip
    demand(
        "\n" not in kind.summary and kind.summary.endswith("."), "the summary is not one sentence",
        where=f"{kind.__name__}.summary", expected="one line that ends with a full stop", found=repr(kind.summary),
        remedy="say in one sentence what it does",
    )  # fmt: skip
    demand(
        isinstance(kind.version, str) and bool(kind.version), "the version is no text",
        where=f"{kind.__name__}.version", found=repr(kind.version), remedy='count as "1", "2", ...',
    )  # fmt: skip
    bare = [name for name, field in kind.Params.model_fields.items() if not field.description]
    demand(
        not bare, "parameters have no description", where=kind.Params.__name__, found=named(bare),
        remedy="give Field(..., description=...): `regraft schema` and editors show it",
    )  # fmt: skip


def refuses_unknown_parameters(subject: Subject) -> None:
    """A parameter that it does not know is an error of the recipe."""
    case = subject.case()
    try:
        make_recipe(case.base, {**subject.step(case), "no_such_parameter": 1})
    except RecipeError:
        return
    demand(
        False, "an unknown parameter is passed over in silence", where=subject.kind.Params.__name__,
        remedy="derive it from regraft.Params, which forbids unknown keys",
    )  # fmt: skip


def parameters_survive_json(subject: Subject) -> None:
    """Parameters written as JSON and read again are the same, whoever makes them, and nobody can change them."""
    case, kind = subject.case(), subject.kind.Params
    params = subject.validated(case)
    where = kind.__name__
    try:
        first, second = (_key(recorded(made)) for made in (params, subject.validated(case)))
    except (TypeError, ValueError) as error:
        demand(False, "the parameters are not JSON", where=where, found=error,
               remedy="use numbers, texts, lists and tables: the lock file records them")  # fmt: skip
        raise
    demand(first == second, "the same recipe gives other parameters", where=where, expected=first, found=second,
           remedy="use constants for defaults, and the run's seed for what is random")  # fmt: skip
    again = _read(kind, first)
    demand(again == params, "parameters read back from JSON are others", where=where, expected=params, found=again,
           remedy="let validators accept what `model_dump` gives")  # fmt: skip
    demand(bool(kind.model_config.get("frozen")), "the parameters can be changed", where=where,
           remedy="derive it from regraft.Params, which is frozen")  # fmt: skip


def _read(kind: type[BaseModel], text: str) -> BaseModel:
    try:
        return kind.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        raise VerificationError(
            "parameters written as JSON are not valid again",
            where=kind.__name__,
            found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            remedy="let validators accept what `model_dump` gives: the lock file is reproduced from it",
        ) from None


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def plan_is_repeatable(subject: Subject) -> None:
    """Planning twice, by one instance or by two, gives the same outline."""
    case = subject.case()
    checkpoint, params = open_checkpoint(str(case.base)), subject.validated(case)
    one = subject.kind()
    outlines = [made.plan(checkpoint, params) for made in (one, one, subject.kind())]
    demand(
        outlines[0] == outlines[1] == outlines[2], "another plan each time", where=subject.kind.name,
        remedy="plan from the checkpoint and the parameters alone, and iterate over sorted names",
    )  # fmt: skip


def plan_reads_headers_alone(subject: Subject) -> None:
    """The plan does not depend on the values of the weights."""
    case, other = subject.case(), subject.case(seed=1)
    params = subject.validated(case)
    outlines = [subject.kind().plan(open_checkpoint(str(base)), params) for base in (case.base, other.base)]
    demand(
        outlines[0] == outlines[1], "the plan depends on the values of the weights", where=subject.kind.name,
        remedy="plan from specs and config; where data decides a shape, give an upper bound and exact=False",
    )  # fmt: skip


def plan_equals_apply(subject: Subject) -> None:
    """On every family the output has the tensors, the files and the bytes that the plan says."""
    for family in subject.families:
        applied = subject.applied(family)
        plan = applied.report.plan
        written = open_checkpoint(str(applied.folder))
        if not plan.exact:
            demand(set(written.specs) <= set(plan.result.specs), "tensors that the plan does not name", where=family,
                   found=named(set(written.specs) - set(plan.result.specs)), remedy="outline them")  # fmt: skip
            continue
        demand(
            dict(written.specs) == dict(plan.result.specs), "other tensors than the plan says", where=family,
            expected=f"{len(plan.result.specs)} tensors", found=f"{len(written.specs)}, or others",
            remedy="give the outline the specs of the patch",
        )  # fmt: skip
        reports = {name for step in applied.report.patches for name in step.reports}
        files = [path for path in applied.folder.rglob("*") if path.is_file()]
        counted = [
            path for path in files
            if path.name not in (CARD, LOCK) and not (path.name in reports and path.parent.parent.name == "regraft")
        ]  # fmt: skip
        size = sum(path.stat().st_size for path in counted)
        demand(
            size == plan.output_bytes or None in (size for step in plan.steps for size in step.outline.files.values()),
            "the output is not as large as the plan says", where=family, expected=f"{plan.output_bytes} bytes",
            found=f"{size} bytes", remedy="outline every file with its exact size",
        )  # fmt: skip

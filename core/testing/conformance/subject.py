"""A transformation under test: its parameters, its tiny bases, and what it made of them; made once for all checks."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, RecipeError, RegraftError, Unsupported, UsageError, VerificationError
from regraft.core.sources import open_checkpoint
from regraft.core.testing.conformance.check import NotApplicable
from regraft.core.testing.models import save_tiny
from regraft.core.testing.running import apply_recipe, make_recipe
from regraft.core.transformation import AnyTransformation

if TYPE_CHECKING:
    from regraft.core.execute import ApplyReport
    from regraft.core.testing.conformance.processes import Probe

USUAL_FAMILIES = ("llama", "gemma2", "gpt2")
"""What is tried where nobody says otherwise: plain; offset norms and a tied head; transposed and fused weights."""

USUAL_NEIGHBOURS = ("context-extension", "lora-merge", "steer")
"""First-party steps before and behind which a transformation is tried."""

REFUSALS = (Unsupported, InputError, UsageError)
"""How a step may refuse; each with a remedy."""

Parameters = Mapping[str, Any] | Callable[[Checkpoint, Path], Mapping[str, Any]]
"""Parameters as a recipe writes them, or what makes them for a base and writes the files that they name."""


@dataclass(frozen=True)
class Case:
    """One use of the transformation: a base, and the parameters for it."""

    base: Path
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Applied:
    """A case after the run: the folder that was written, and the report."""

    case: Case
    folder: Path
    report: ApplyReport


class Subject:
    """A transformation with its parameters, in a folder of its own.

    Args:
        kind: the class; importable by its module and name.
        folder: for bases and outputs.
        params: by default what `kind.example` gives.
        families: model families that it must work on; by default those of `USUAL_FAMILIES` that it does not refuse.
        neighbours: first-party steps that it is composed with.
    """

    def __init__(
        self,
        kind: type[AnyTransformation],
        folder: Path,
        *,
        params: Parameters | None = None,
        families: Sequence[str] = (),
        neighbours: Sequence[str] = USUAL_NEIGHBOURS,
    ) -> None:
        self.kind = kind
        self.folder = folder
        self.neighbours = tuple(neighbours)
        self._given = tuple(families)
        self._params = kind.example if params is None else params
        self._cases: dict[tuple[Any, ...], Case] = {}
        self._applied: dict[tuple[Any, ...], Applied] = {}
        self._count = 0
        self.environment = dict(os.environ)
        self.probes: tuple[Probe, Probe] | None = None

    @cached_property
    def families(self) -> tuple[str, ...]:
        """Families that it is tried on.

        Raises:
            VerificationError: it refuses all that are usual.
        """
        if self._given:
            return self._given
        refusals = {family: self.refusal(self.case(family)) for family in USUAL_FAMILIES}
        accepted = tuple(family for family, refusal in refusals.items() if refusal is None)
        if not accepted:
            raise VerificationError(
                "it refuses every family that is usually tried", where=self.kind.name,
                expected=f"one of {', '.join(USUAL_FAMILIES)}", found=refusals[USUAL_FAMILIES[0]],
                remedy="give parameters that fit (`example`), or name `families` that it supports",
            )  # fmt: skip
        return accepted

    @property
    def family(self) -> str:
        """The family that most checks look at."""
        return self.families[0]

    def place(self, name: str) -> Path:
        """A path inside the folder that nothing has yet."""
        self._count += 1
        return self.folder / f"{self._count:03d}-{name}"

    def case(self, family: str | None = None, **options: Any) -> Case:
        """A tiny base of `family`, with `options` of `save_tiny`, and the parameters for it."""
        family = family or self.family
        key = (family, *sorted(options.items()))
        if key not in self._cases:
            base = self.place(family)
            shutil.copytree(tiny_base(family, **options), base)
            self._cases[key] = self.case_of(base)
        return self._cases[key]

    def case_of(self, base: Path) -> Case:
        """The parameters for any base."""
        if not callable(self._params):
            return Case(base, self._params)
        inputs = self.place("inputs")
        inputs.mkdir(parents=True)
        return Case(base, self._params(open_checkpoint(str(base)), inputs))

    def step(self, case: Case) -> dict[str, Any]:
        """The step of a recipe."""
        return {"use": self.kind, "id": "step", **case.params}

    def validated(self, case: Case) -> Any:
        """The parameters as the transformation gets them.

        Raises:
            VerificationError: they are not valid.
        """
        try:
            return make_recipe(case.base, self.step(case)).steps[0].params
        except RecipeError as error:
            raise VerificationError(
                "the parameters that it is tried with are not valid", where=self.kind.name,
                found="; ".join(problem.message for problem in error.problems),
                remedy="give the class an `example`, or the tests `params`",
            ) from None  # fmt: skip

    def refusal(self, case: Case) -> RegraftError | None:
        """Why it cannot be applied; None if it can.

        Raises:
            VerificationError: the parameters are not valid.
        """
        params, checkpoint, made = self.validated(case), open_checkpoint(str(case.base)), self.kind()
        try:
            made.check(checkpoint, params)
            made.plan(checkpoint, params)
        except REFUSALS as error:
            return error
        return None

    def applied(self, family: str | None = None, **options: Any) -> Applied:
        """The case of these arguments, applied; once."""
        key = (family or self.family, *sorted(options.items()))
        if key not in self._applied:
            self._applied[key] = self.apply(self.case(family, **options))
        return self._applied[key]

    def apply(self, case: Case, **options: Any) -> Applied:
        """Apply a case, with options of `apply_recipe`."""
        output = self.place("output")
        return Applied(case, output, apply_recipe(case.base, self.step(case), to=output, **options))


def refuses_well(error: RegraftError) -> bool:
    """Whether a refusal is one that a user can act on."""
    return isinstance(error, REFUSALS) and bool(error.remedy or isinstance(error, UsageError))


def unless_refused(error: RegraftError, what: str) -> NotApplicable:
    """What to raise where a refusal is in order.

    Raises:
        VerificationError: it names no remedy, or is of another kind.
    """
    if not refuses_well(error):
        raise VerificationError(
            f"{what}: refused in the wrong way", expected="Unsupported or InputError, with a remedy",
            found=f"{type(error).__name__}: {error}", remedy="raise Unsupported(reason, remedy=...) from `check`",
        ) from error  # fmt: skip
    return NotApplicable(f"{what}: refused ({error.message})")


@cache
def workshop() -> Path:
    """A folder for what all subjects of this process share; gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="regraft-testing-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def tiny_base(family: str, **options: Any) -> Path:
    """A tiny checkpoint in several files with a tokenizer, made once in a process; whoever changes it takes a copy."""
    settings = {"shards": "60KB", "tokenizer": True, **options}
    name = "-".join([family, *(f"{key}={value}" for key, value in sorted(options.items()))])
    return save_tiny(family, workshop() / name.replace("/", "_"), **settings)

"""All checks, in the order in which they run, and a run of them without pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from regraft.core.errors import UsageError
from regraft.core.recipe.suggest import did_you_mean
from regraft.core.testing.conformance import caching, composition, contract, loading, output, processes, refusals, state
from regraft.core.testing.conformance.check import Check, Outcome
from regraft.core.testing.conformance.subject import Subject

CHECKS: tuple[Check, ...] = tuple(
    map(
        Check,
        (
            contract.has_an_example,
            contract.describes_itself,
            contract.refuses_unknown_parameters,
            contract.parameters_survive_json,
            contract.plan_is_repeatable,
            contract.plan_reads_headers_alone,
            contract.plan_equals_apply,
            output.leaves_the_base_alone,
            output.leaves_other_tensors_alone,
            output.leaves_other_keys_alone,
            output.keeps_the_tokenizer,
            output.keeps_the_dtype,
            output.takes_any_sharding,
            output.takes_tied_and_untied_heads,
            output.names_no_place_of_this_machine,
            output.is_recorded,
            output.metrics_are_plain,
            loading.loads_in_transformers,
            loading.computes_finite_numbers,
            refusals.refuses_unknown_architectures,
            refusals.refuses_missing_tensors,
            refusals.refuses_misshapen_tensors,
            state.takes_its_seed_from_the_run,
            state.leaves_the_process_alone,
            state.keeps_nothing_between_steps,
            composition.composes_before_others,
            composition.composes_behind_others,
            composition.applies_as_a_saved_patch,
            caching.comes_out_of_the_cache,
            processes.imports_are_light,
            processes.weights_are_deterministic,
            processes.records_are_deterministic,
            processes.writes_nowhere_else,
            processes.memory_is_bounded,
        ),
    )
)
"""Every check. The first must hold for the others to mean anything."""


def check(name: str) -> Check:
    """The check of that name.

    Raises:
        UsageError: there is none.
    """
    found = {one.name: one for one in CHECKS}
    if name not in found:
        raise UsageError("no such check", found=name, expected="one of those that `regraft plugins check` lists",
                         remedy=did_you_mean(name, found) or "correct the name")  # fmt: skip
    return found[name]


def conform(
    subject: Subject,
    *,
    without: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    listen: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the checks on `subject`, one after another; where the first fails, or the example says that it cannot be had
    here, no other.

    Args:
        subject: what is tried.
        without: checks that are known not to apply, with the reason.
        only: names of the checks to run; all if empty.
        listen: told each outcome as it comes.

    Raises:
        UsageError: a name is not that of a check.
    """
    reasons = dict(without or {})
    chosen = {check(name).name for name in only}
    for name in reasons:
        check(name)
    outcomes: list[Outcome] = []
    for one in _chosen(chosen):
        reason = reasons.get(one.name)
        outcome = one.run(subject) if reason is None else Outcome(one.name, "not applicable", reason)
        outcomes.append(outcome)
        listen(outcome)
        if one is CHECKS[0] and reason is None and outcome.status != "passed":
            break
    return outcomes


def _chosen(names: set[str]) -> Iterable[Check]:
    return [one for one in CHECKS if not names or one.name in names or one is CHECKS[0]]

"""Every check fails on a transformation that breaks it, and none on a sound one."""

import os
from pathlib import Path

import pytest

from regraft.core.testing.conformance import processes
from regraft.core.testing.conformance.subject import Subject
from regraft.core.testing.conformance.suite import CHECKS, check
from tests.core.testing import broken
from tests.core.testing.heavy import Heavy

FAULTS = {
    "has_an_example": broken.WithoutExample,
    "describes_itself": broken.Undescribed,
    "refuses_unknown_parameters": broken.Loose,
    "parameters_survive_json": broken.Changing,
    "plan_is_repeatable": broken.Counting,
    "plan_reads_headers_alone": broken.Peeking,
    "plan_equals_apply": broken.Unplanned,
    "leaves_the_base_alone": broken.Scribbling,
    "leaves_other_tensors_alone": broken.Damaging,
    "leaves_other_keys_alone": broken.Rewriting,
    "keeps_the_tokenizer": broken.Dropping,
    "keeps_the_dtype": broken.Widening,
    "takes_any_sharding": broken.FirstShard,
    "takes_tied_and_untied_heads": broken.Head,
    "names_no_place_of_this_machine": broken.Telling,
    "is_recorded": broken.Unrecorded,
    "metrics_are_plain": broken.Rambling,
    "loads_in_transformers": broken.Adding,
    "computes_finite_numbers": broken.Exploding,
    "refuses_unknown_architectures": broken.Lookup,
    "refuses_missing_tensors": broken.Trusting,
    "refuses_misshapen_tensors": broken.Rigid,
    "takes_its_seed_from_the_run": broken.Noisy,
    "keeps_nothing_between_steps": broken.Remembering,
    "composes_before_others": broken.OneShot,
    "composes_behind_others": broken.Stored,
    "applies_as_a_saved_patch": broken.Disguised,
    "comes_out_of_the_cache": broken.Disguised,
}
"""Found in this process."""

FAULTS_OF_PROCESSES = {
    "leaves_the_process_alone": broken.Meddling,
    "imports_are_light": Heavy,
    "weights_are_deterministic": broken.Hashing,
    "records_are_deterministic": broken.Unordered,
    "writes_nowhere_else": broken.Littering,
    "memory_is_bounded": broken.Hoarding,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The current folder: some of the broken ones litter. A step cache is there, as for any user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("place"))
        patch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("REGRAFT_CACHE_SIZE")
        yield tmp_path_factory


@pytest.fixture(scope="module")
def probed(place):
    """Subjects whose processes have answered, all at once."""
    kinds = [broken.Sound, broken.Drawing, *FAULTS_OF_PROCESSES.values()]
    subjects = {kind: Subject(kind, place.mktemp(kind.name), families=("llama",)) for kind in kinds}
    large = processes._large
    with pytest.MonkeyPatch.context() as patch:
        measured = (broken.Sound, broken.Hoarding)
        patch.setattr(processes, "_large", lambda subject: large(subject) if subject.kind in measured else None)
        processes.probe(list(subjects.values()))
    return subjects


def test_every_check_has_a_fault():
    assert {one.name for one in CHECKS} == {*FAULTS, *FAULTS_OF_PROCESSES}
    assert len(CHECKS) >= 20


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(place, name):
    subject = Subject(FAULTS[name], place.mktemp(name), families=("llama",), neighbours=("lora-merge",))
    outcome = check(name).run(subject)
    assert outcome.status == "failed"
    assert "remedy" in outcome.message or outcome.error is not None


@pytest.mark.parametrize("name", FAULTS_OF_PROCESSES)
def test_a_fault_that_shows_in_another_process_is_found(probed, name):
    outcome = check(name).run(probed[FAULTS_OF_PROCESSES[name]])
    assert outcome.status == "failed"
    assert "remedy" in outcome.message


@pytest.mark.parametrize("name", ["takes_its_seed_from_the_run", "weights_are_deterministic"])
def test_the_step_cache_hides_no_fault(probed, name):
    assert check(name).run(probed[broken.Drawing]).status == "failed"
    assert list(Path(os.environ["REGRAFT_CACHE"]).iterdir()) == []


def test_no_step_takes_its_id_from_a_key_of_recipes(place):
    outcome = check("describes_itself").run(Subject(broken.Reserved, place.mktemp("reserved"), families=("llama",)))
    assert outcome.status == "failed"
    assert "found: output" in outcome.message


@pytest.mark.parametrize("one", CHECKS, ids=lambda one: one.name)
def test_a_sound_one_passes(probed, one):
    outcome = one.run(probed[broken.Sound])
    assert outcome.status == "passed", outcome.message


@pytest.mark.parametrize("one", CHECKS, ids=lambda one: one.name)
def test_a_check_says_in_one_line_what_holds(one):
    assert one.holds.endswith(".")
    assert 30 < len(one.holds) < 120

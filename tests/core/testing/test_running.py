"""One step or one recipe in a call, tiny data, and the order of the checks."""

import json
import typing

import pytest

from regraft.core.errors import RecipeError, TransformationError, Unsupported, UsageError
from regraft.core.testing.conformance.subject import Subject
from regraft.core.testing.conformance.suite import CHECKS, check, conform
from regraft.core.testing.data import completions, preferences, texts, write_rows
from regraft.core.testing.running import apply_recipe, host_of, run_step
from regraft.core.transformation import Run
from tests.checkpoints import bits, read_all
from tests.core.testing import broken


def test_a_step_is_checked_planned_and_applied(tiny_folder):
    result = run_step(broken.Sound, tiny_folder("llama"), {"factor": 3.0})
    assert result.params.factor == 3.0
    assert set(result.outline.specs) == set(result.patch.edits) == set(broken.NAMES)
    for name in broken.NAMES:
        assert bits(result.checkpoint.load(name)) == bits(result.below.load(name) * 3)
    again = run_step(broken.Sound, result.checkpoint, run=Run("second"))
    assert bits(again.checkpoint.load(name)) == bits(result.below.load(name) * 6)


def test_a_step_that_breaks_its_word_or_refuses_says_so(tiny_folder):
    base = tiny_folder("llama")
    with pytest.raises(TransformationError, match="not what the plan said"):
        run_step(broken.Unplanned, base)
    with pytest.raises(RecipeError) as caught:
        run_step(broken.Sound, base, {"facto": 3.0})
    assert 'did you mean "factor"?' in str(caught.value)
    with pytest.raises(Unsupported, match="a tensor is missing"):
        run_step(broken.Sound, tiny_folder("gpt2"))


def test_a_recipe_of_classes_and_names_is_written(tiny_folder, tmp_path):
    steps = ({"use": broken.Sound, "factor": 3.0}, {"use": "context-extension", "method": "abf", "target_length": 512})
    report = apply_recipe(tiny_folder("llama"), *steps, to=tmp_path / "out", dtype="bfloat16")
    assert {str(tensor.dtype) for tensor in read_all(tmp_path / "out").values()} == {"torch.bfloat16"}
    assert [step.id for step in report.plan.steps] == ["toy-sound", "context-extension"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512


def test_a_host_knows_our_plugins_and_what_it_is_given():
    assert {"toy-sound", "steer"} <= set(host_of(broken.Sound).transformations())
    assert "toy-sound" not in host_of().transformations()
    heard = []
    host_of(regraft_before_step=lambda step, checkpoint: heard.append(step)).before_step("s", typing.Any)
    assert heard == ["s"]


@pytest.mark.parametrize("made", [texts, completions, preferences])
def test_tiny_rows_differ_and_fit_the_tiny_tokenizer(tmp_path, made):
    rows = made(40)
    assert len({json.dumps(row) for row in rows}) == 40
    assert all(32 <= ord(character) < 127 for row in rows for text in row.values() for character in text)
    file = write_rows(tmp_path / "new" / "rows.jsonl", rows)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows


def test_where_the_example_does_not_hold_nothing_else_is_tried(tmp_path):
    heard = []
    subject = Subject(broken.WithoutExample, tmp_path, families=("llama",))
    outcomes = conform(subject, listen=heard.append)
    assert heard == outcomes
    assert [(outcome.check, outcome.status) for outcome in outcomes] == [("has_an_example", "failed")]
    assert "give the class an `example`" in outcomes[0].message


def test_where_the_example_needs_what_is_not_installed_no_check_applies(tmp_path):
    (outcome,) = conform(Subject(broken.WithoutPackage, tmp_path, families=("llama",)))
    assert outcome.status == "not applicable"
    assert outcome.message == "it needs nothing-like-it, which is not installed"
    broken_example = conform(Subject(broken.WithoutPackage, tmp_path, families=("llama",), params={"facto": 1.0}))
    assert [one.status for one in broken_example] == ["failed"]


def test_only_and_without_name_checks(tmp_path):
    subject = Subject(broken.Sound, tmp_path, families=("llama",))
    reasons = {"describes_itself": "no need"}
    outcomes = conform(subject, only=["describes_itself", "plan_is_repeatable"], without=reasons)
    assert [(outcome.check, outcome.status) for outcome in outcomes] == [
        ("has_an_example", "passed"),
        ("describes_itself", "not applicable"),
        ("plan_is_repeatable", "passed"),
    ]
    with pytest.raises(UsageError, match="no such check") as caught:
        check("plan_is_repeatabel")
    assert caught.value.remedy == 'did you mean "plan_is_repeatable"?'


def test_what_refuses_every_usual_family_needs_others_named(tmp_path):
    assert Subject(broken.Sound, tmp_path / "a").families == ("llama", "gemma2")

    class Refusing(broken.Sound):
        name = "toy-refusing"

        def check(self, checkpoint, params):
            raise Unsupported("is not for you", remedy="go away")

    outcome = CHECKS[0].run(Subject(Refusing, tmp_path / "b"))
    assert outcome.status == "failed"
    assert "it refuses every family that is usually tried" in outcome.message

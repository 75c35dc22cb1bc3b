"""`regraft check`: a recipe, with its base or without."""

from pathlib import Path

from tests.running import ABF, done, regraft, tree, write_recipe


def test_a_good_recipe(workplace):
    recipe = write_recipe(Path("r.toml"), "base", ABF)
    before = tree(workplace)
    assert done("check", recipe).out == "r: 1 step, no errors\n"
    assert done("check", recipe, "--json").json == {
        "schema": 1, "recipe": "r", "steps": ["context-extension"], "findings": [],
    }  # fmt: skip
    assert tree(workplace) == before


def test_without_its_base(workplace):
    recipe = write_recipe(Path("r.toml"), "./not-here", ABF, {**ABF, "id": "more", "target_length": 8192})
    assert regraft("check", recipe).code == 3
    assert done("check", recipe, "--recipe-only").out == "r: 2 steps, no errors (the base was not opened)\n"


def test_a_step_that_cannot_be_applied(workplace):
    ran = regraft("check", write_recipe(Path("r.toml"), "base", {**ABF, "target_length": 100}))
    assert (ran.code, ran.out) == (1, "")
    assert "the model reaches that far already" in ran.err


def test_set(workplace):
    recipe = write_recipe(Path("r.toml"), "base", ABF)
    assert regraft("check", recipe, "--set", "context-extension.methd=abf").code == 2
    assert done("check", recipe, "--set", "context-extension.method=yarn").code == 0


def test_several_recipes_are_all_looked_at(workplace):
    good = write_recipe(Path("good.toml"), "base", ABF)
    wrong = write_recipe(Path("wrong.toml"), "base", {**ABF, "methd": "abf"})
    missing = write_recipe(Path("missing.toml"), "./not-here", ABF)
    assert done("check", good, good).out == "good: 1 step, no errors\n" * 2
    ran = regraft("check", wrong, good, missing)
    assert (ran.code, ran.out) == (2, "good: 1 step, no errors\n")
    assert "methd" in ran.err
    assert "not-here" in ran.err
    assert regraft("check", missing, wrong).code == 3
    found = regraft("check", good, wrong, "--json")
    assert found.json == {
        "schema": 1, "recipes": [{"recipe": "good", "steps": ["context-extension"], "findings": []}],
    }  # fmt: skip
    assert found.events[0]["exit_code"] == found.code == 2

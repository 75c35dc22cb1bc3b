"""NaN and Inf: counted where a step reads them, refused with --strict, found by `verify --deep`."""

from pathlib import Path

import pytest

from tests.cli.faults import set_values
from tests.running import ABF, done, regraft, write_recipe

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def spoilt(workplace):
    set_values(NAME, float("nan"), 3)
    return workplace


def test_what_a_step_reads_is_counted_and_carried(spoilt):
    write_recipe(Path("recipe.toml"), "base", path="out", dtype="bfloat16")
    ran = done("apply", "recipe.toml")
    assert (
        ran.err
        == f"warning: {NAME}: 3 NaN, 0 Inf in the base, carried through the step that reads it (--strict refuses)\n"
    )
    ran = done("apply", "recipe.toml", "--force", "--json")
    assert ran.json["non_finite_inputs"] == {NAME: {"nan": 3, "inf": 0}}


def test_what_no_step_reads_is_not_scanned(spoilt):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    assert done("apply", "recipe.toml", "--strict").err == ""


def test_verify_deep_scans_everything(spoilt):
    assert done("verify", "base").code == 0
    ran = regraft("verify", "base", "--deep")
    assert ran.code == 1
    assert f"fault: base: {NAME}: the tensor is not finite (expected finite numbers, found 3 NaN, 0 Inf)\n" in ran.out
    assert ran.err == "error: base: 1 fault\n  remedy: take the weights from before they were spoilt\n"
    ran = regraft("verify", "base", "--deep", "--json")
    assert [finding["where"] for finding in ran.json["findings"] if finding["fatal"]] == [f"base: {NAME}"]
    assert ran.json["ok"] is False

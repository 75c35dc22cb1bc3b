"""`regraft plan`: exact, and nothing is written."""

from pathlib import Path

import pytest

from tests.adapters import write_adapter
from tests.running import ABF, done, regraft, tree, write_recipe

MERGE = {"use": "lora-merge", "adapter": "adapter"}


def test_the_plan_for_people(workplace):
    write_adapter("adapter")
    recipe = write_recipe(Path("r.toml"), "base", ABF, MERGE, path="out")
    before = tree(workplace)
    out = done("plan", recipe, "--tensors").out
    assert out.startswith("r: base, 21 tensors\n")
    assert "    config.json: max_position_embeddings, rope_parameters\n" in out
    assert "tensors: 19 copied, 2 rewritten, 0 added, 0 dropped\n" in out
    assert "  rewritten: model.layers.0.self_attn.q_proj.weight F32 [64, 64]\n" in out
    assert "output: exactly " in out
    assert "plus lock file and model card\n" in out
    assert tree(workplace) == before


def test_the_plan_is_what_apply_writes(workplace):
    write_adapter("adapter")
    recipe = write_recipe(Path("r.toml"), "base", ABF, MERGE, path="out", dtype="bfloat16", shard_size=30_000)
    plan = done("plan", recipe, "--json").json
    done("apply", recipe)
    found = {path.name: path.stat().st_size for path in Path("out").iterdir() if path.is_file()}
    records = found.pop("README.md") + found.pop("regraft.lock.json")
    assert {**plan["weight_files"], **plan["files"]} == found
    assert plan["output_bytes"] == sum(found.values())
    assert plan["exact"] is True
    assert plan["schema"] == 1
    assert plan["disk_bytes"] >= plan["output_bytes"] + records
    assert plan["recipe"]["output"]["shard_size"] == 30_000
    assert [step["use"] for step in plan["steps"]] == ["context-extension", "lora-merge"]


def test_plan_refuses_what_apply_would(workplace):
    recipe = write_recipe(Path("r.toml"), "base", ABF, path="base/inside")
    ran = regraft("plan", recipe)
    assert (ran.code, ran.out) == (2, "")
    assert "stands inside an input" in ran.err
    assert regraft("plan", recipe, "--output", "base").code == 2
    assert done("plan", recipe, "--output", "elsewhere").code == 0


@pytest.mark.parametrize("rate", ["0", "inf", "nan"])
def test_a_rate_at_which_nobody_writes_is_refused(rate):
    assert regraft("plan", "quickstart", "--world-size", "2", "--rate", rate).code == 2


def test_more_processes_than_there_are_machines_for_are_refused():
    assert regraft("plan", "quickstart", "--world-size", "1000000000").code == 2


def test_a_target_that_needs_force_is_noted(workplace):
    recipe = write_recipe(Path("r.toml"), "base", ABF, path="out")
    done("apply", recipe)
    assert (
        "note: out: the target is not empty: apply needs --force, which replaces it whole\n" in done("plan", recipe).out
    )


def test_without_a_target(workplace):
    assert done("plan", write_recipe(Path("r.toml"), "base", ABF)).code == 0

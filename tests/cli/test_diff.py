"""`regraft diff`: exit code 1 where there is a difference."""

import json
import shutil
from pathlib import Path

from tests.cli.faults import set_values
from tests.running import ABF, done, regraft, write_recipe


def test_equal(workplace):
    shutil.copytree("base", "same")
    assert done("diff", "base", "same").out == "no difference (21 tensors)\n"
    result = done("diff", "base", "same", "--json").json
    assert (result["schema"], result["equal"], result["equal_tensors"]) == (1, True, 21)


def test_config_and_values(workplace):
    done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"))
    set_values("model.norm.weight", 100.0)
    ran = regraft("diff", "base", "out")
    assert (ran.code, ran.err) == (1, "")
    lines = ran.out.splitlines()
    assert lines[0].split() == ["tensor", "change", "before", "after", "max", "|d|", "|d|/|before|"]
    assert lines[1].startswith("model.norm.weight  values  F32 [64]  F32 [64]  ")
    change = json.loads(next(line for line in lines if line.startswith("config.json: ")).removeprefix("config.json: "))
    assert change == {"max_position_embeddings": 4096, "rope_parameters": {"rope_theta": 500000.0}}
    assert lines[-1] == "1 tensor differs, 20 are equal"
    result = regraft("diff", "base", "out", "--json").json
    assert result["equal"] is False
    assert result["tensors"][0]["max_abs"] > 98


def test_nan_is_valid_json(workplace):
    shutil.copytree("base", "before")
    set_values("model.norm.weight", float("nan"))
    result = regraft("diff", "before", "base", "--json").json
    assert result["tensors"][0]["max_abs"] in ("nan", "inf")


def test_cards_only_with_all(workplace):
    shutil.copytree("base", "other")
    Path("other/README.md").write_text("# Other")
    assert regraft("diff", "base", "other").code == 0
    ran = regraft("diff", "base", "other", "--all")
    assert ran.code == 1
    assert "README.md: added" in ran.out


def test_long_lists_are_cut(workplace):
    done("apply", write_recipe(Path("r.toml"), "base", path="out", dtype="float16"))
    ran = regraft("diff", "base", "out")
    assert "... and 1 more (--all shows them)\n" in ran.out
    assert "more (--all" not in regraft("diff", "base", "out", "--all").out

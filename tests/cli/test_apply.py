"""`regraft apply`: what it prints for people and for programs, and what its options do."""

import shutil
from pathlib import Path

from tests.adapters import write_adapter
from tests.running import ABF, done, regraft, tree, write_recipe

MERGE = {"use": "lora-merge", "adapter": "adapter"}


def test_the_last_lines_say_what_was_written_and_how_to_use_it(workplace):
    write_adapter("adapter")
    ran = done("apply", write_recipe(Path("r.toml"), "base", ABF, MERGE, path="out"))
    lines = ran.out.splitlines()
    assert lines[0].startswith("context-extension: Extend the context window")
    assert lines[-2].startswith("wrote out: 33")
    assert lines[-2].endswith(" s, verified: structure")
    assert lines[-1] == 'use it: AutoModelForCausalLM.from_pretrained("out")'
    assert ran.err == ""


def test_json(workplace):
    write_adapter("adapter")
    ran = done("apply", write_recipe(Path("r.toml"), "base", ABF, MERGE, path="out"), "--json")
    result = ran.json
    assert result["schema"] == 1
    assert (result["target"], result["verified"]) == ("out", "structure")
    assert result["bytes"] == sum(path.stat().st_size for path in Path("out").rglob("*") if path.is_file())
    assert [step["id"] for step in result["steps"]] == ["context-extension", "lora-merge"]
    assert result["changes"] == {"copied": 19, "rewritten": 2, "added": 0, "dropped": 0}
    assert result["copied_bytes"] + result["computed_bytes"] == 312576
    assert {event["event"] for event in ran.events} == {"progress"}
    assert all(event["schema"] == 1 for event in ran.events)
    assert ran.events[0]["bytes"] == 0
    assert ran.events[-1] == {"schema": 1, "event": "progress", "bytes": 312576, "total_bytes": 312576}


def test_progress_is_complete_with_links_too(workplace):
    ran = done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"), "--json", "--link")
    assert ran.events[-1]["bytes"] == ran.events[-1]["total_bytes"] == 0
    assert ran.json["linked_bytes"] > 312576


def test_output_overrides_the_recipe(workplace):
    done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"), "--output", "other/place")
    assert not Path("out").exists()
    assert Path("other/place/config.json").is_file()


def test_set_overrides_keys(workplace):
    recipe = write_recipe(Path("r.toml"), "base", ABF, path="out")
    ran = done(
        "apply", recipe, "--set", "output.dtype=bfloat16", "--set", "context-extension.target_length=512", "--json"
    )
    assert ran.json["changes"]["rewritten"] == 21
    assert done("inspect", "out", "--json").json["max_position_embeddings"] == 512


def test_a_recipe_elsewhere_finds_its_base_beside_it_and_writes_here(workplace, monkeypatch, tmp_path):
    Path("recipes").mkdir()
    shutil.move("base", "recipes/base")
    write_recipe(Path("recipes/r.toml"), "base", ABF, path="out")
    done("apply", "recipes/r.toml")
    assert Path("out/config.json").is_file()


def test_force_replaces_the_whole_target(workplace):
    recipe = write_recipe(Path("r.toml"), "base", ABF, path="out")
    done("apply", recipe)
    Path("out/stale.txt").write_text("x")
    first = tree(Path("out"))
    done("apply", recipe, "--force")
    assert first.keys() - tree(Path("out")).keys() == {"stale.txt"}
    assert not Path(".out.regraft").exists()


def test_an_empty_target_needs_no_force(workplace):
    Path("out").mkdir()
    done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"))
    assert Path("out/regraft.lock.json").is_file()


def test_what_is_left_behind_is_said(workplace):
    Path("base/pytorch_model.bin").write_bytes(b"\x80")
    Path("base/LICENSE").write_text("Apache")
    Path("base/sub").mkdir()
    Path("base/sub/processor.json").write_text("{}")
    ran = done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"))
    assert ran.err.startswith("left behind: pytorch_model.bin: ")
    assert Path("out/LICENSE").read_text() == "Apache"
    assert Path("out/sub/processor.json").is_file()
    assert not Path("out/pytorch_model.bin").exists()
    ran = done("apply", "r.toml", "--force", "--json")
    assert set(ran.json["left_behind"]) == {"pytorch_model.bin"}


def test_notes_about_the_base_are_said(workplace):
    import json

    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    ran = done("apply", write_recipe(Path("r.toml"), "base", path="out", dtype="bfloat16"))
    assert ran.err.startswith("note: base: config.json: model_type: tensors were not compared with the config")
    assert done("apply", "r.toml", "--force", "--json").json["findings"]


def test_a_shipped_recipe_has_precedence_after_files(workplace):
    """A file named like a recipe, without suffix, is meant before a shipped one."""
    write_recipe(Path("quickstart"), "base", ABF, path="out")
    assert done("check", "quickstart", "--json").json["recipe"] == "quickstart"
    assert done("check", "quickstart", "--json").json["steps"] == ["context-extension"]


def test_durable_or_not_gives_the_same_bytes(workplace):
    recipe = write_recipe(Path("r.toml"), "base", ABF, path="out", dtype="bfloat16")
    done("apply", recipe)
    done("apply", recipe, "--no-durable", "--output", "other")
    assert tree(Path("out")) == tree(Path("other"))


def test_a_base_that_is_a_single_file(workplace, tiny_folder):
    folder = tiny_folder("llama", shards=None)
    done("apply", write_recipe(Path("r.toml"), folder / "model.safetensors", ABF, path="out"))
    assert Path("out/model.safetensors").is_file()
    assert regraft("diff", folder, "out", "--json").json["tensors"] == []

"""`regraft recipes`: list, show, copy."""

import json
from pathlib import Path

import pytest

from regraft.core.recipe.shipped import shipped_names, shipped_path
from tests.running import done, regraft


def test_list():
    listed = done("recipes").out.splitlines()
    assert listed[0].split() == ["recipe", "what", "it", "does"]
    assert [line.split()[0] for line in listed[1:]] == shipped_names()
    assert done("recipes", "list").out == done("recipes").out
    result = done("recipes", "--json").json
    assert result["schema"] == 1
    assert all(item["summary"] for item in result["recipes"])
    assert done("recipes", "list", "--json").json == result


@pytest.mark.parametrize("name", shipped_names())
def test_show(name):
    assert done("recipes", "show", name).out == shipped_path(name).read_text()
    assert done("recipes", "show", name, "--json").json["text"] == shipped_path(name).read_text()


def test_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert done("recipes", "copy", "yarn").out == "yarn.toml\n"
    assert Path("yarn.toml").read_text() == shipped_path("yarn").read_text()
    ran = regraft("recipes", "copy", "yarn")
    assert ran.code == 2
    assert "exists already" in ran.err
    done("recipes", "copy", "yarn", "--force")
    result = done("recipes", "copy", "yarn", "mine.toml", "--json").json
    assert result == {"schema": 1, "path": "mine.toml", "data": []}
    ran = regraft("recipes", "copy", "yarn", "nowhere/mine.toml")
    assert ran.code == 4
    assert "nowhere/mine.toml: cannot be written" in ran.err
    assert regraft("recipes", "copy", "yran").code == 2


def test_copy_brings_what_the_recipe_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = ["quickstart-adapter/adapter_config.json", "quickstart-adapter/adapter_model.safetensors"]
    assert done("recipes", "copy", "quickstart").out.splitlines() == ["quickstart.toml", *adapter]
    done("recipes", "copy", "merge-lora")  # reads the same adapter: it may lie there
    done("check", "quickstart.toml", "merge-lora.toml")
    Path(adapter[0]).write_text("mine")
    ran = regraft("recipes", "copy", "quickstart", "other.toml")
    assert (ran.code, Path("other.toml").exists(), Path(adapter[0]).read_text()) == (2, False, "mine")
    assert f"{adapter[0]}: the file exists already" in ran.err


@pytest.mark.parametrize("name", shipped_names())
def test_a_copy_is_complete(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done("recipes", "copy", name)
    done("check", f"{name}.toml")


def test_schema_is_a_json_schema():
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(done("schema").out)
    jsonschema.Draft202012Validator.check_schema(document)
    assert done("schema", "--json").out == done("schema").out
    uses = json.dumps(document)
    for name in ("context-extension", "lora-merge", "patch"):
        assert f'"{name}"' in uses

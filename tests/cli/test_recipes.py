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
    assert done("recipes", "copy", "quickstart").out == "quickstart.toml\n"
    assert Path("quickstart.toml").read_text() == shipped_path("quickstart").read_text()
    ran = regraft("recipes", "copy", "quickstart")
    assert ran.code == 2
    assert "exists already" in ran.err
    done("recipes", "copy", "quickstart", "--force")
    assert done("recipes", "copy", "quickstart", "mine.toml", "--json").json == {"schema": 1, "path": "mine.toml"}
    ran = regraft("recipes", "copy", "quickstart", "nowhere/mine.toml")
    assert ran.code == 4
    assert "nowhere/mine.toml: cannot be written" in ran.err


def test_schema_is_a_json_schema():
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(done("schema").out)
    jsonschema.Draft202012Validator.check_schema(document)
    assert done("schema", "--json").out == done("schema").out
    uses = json.dumps(document)
    for name in ("context-extension", "lora-merge", "patch"):
        assert f'"{name}"' in uses

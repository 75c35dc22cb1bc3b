"""The JSON Schema agrees with what `load_recipe` accepts."""

import json

import jsonschema
import pytest
import tomli

from regraft.core.errors import RecipeError
from regraft.core.recipe.schema import DIALECT, recipe_schema
from tests.core.recipe.texts import BASE, MERGE

LOFIT = '[[steps]]\nuse = "lofit"\ndata = "x"\n'

VALID = [
    BASE + MERGE,
    BASE + MERGE + '[output]\ndtype = "float16"\nshard_size = "1.5GiB"\n',
    BASE + "[output]\nshard_size = 4096\n",
    "schema = 1\nseed = 3\nname = 'x'\n" + BASE + MERGE + 'id = "b"\nscale = 2\n',
    BASE + LOFIT + 'select = { kind = "scale", heads = 1 }\ntune = { kind = "gradient", lr = 1 }\ncorpus = "demo"\n',
]
INVALID = [
    "seed = 1\n" + MERGE,
    BASE + MERGE + "scal = 1\n",
    BASE + MERGE + 'scale = "x"\n',
    BASE + "[[steps]]\nuse = 'nope'\n",
    BASE + "[[steps]]\nadapter = 'x'\n",
    BASE + "[[steps]]\nuse = 'lora-merge'\n",
    BASE + LOFIT + 'select = { kind = "scale", heads = 0 }\n',
    BASE + LOFIT + 'tune = { kind = "scale", lr = 1 }\n',
    BASE + MERGE + '[output]\nshard_size = "5G"\n',
    BASE + MERGE + "[output]\nseed = 1\n",
    "schema = 2\n" + BASE + MERGE,
    "name = 'a b'\n" + BASE + MERGE,
    "seed = -1\n" + BASE + MERGE,
    "[base]\nrevision = 'x'\n" + MERGE,
    BASE + MERGE + "id = 'a b'\n",
    BASE + "steps.use = 'lofit'\n",
]


@pytest.fixture
def validator(transformations):
    schema = recipe_schema(transformations)
    json.dumps(schema)
    assert schema["$schema"] == DIALECT
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("text", VALID)
def test_valid_for_both(validator, load, text):
    load(text)
    validator.validate(tomli.loads(text))


@pytest.mark.parametrize("text", INVALID)
def test_invalid_for_both(validator, load, text):
    with pytest.raises(RecipeError):
        load(text)
    assert not validator.is_valid(tomli.loads(text))


def test_what_may_be_inherited_is_not_required(validator):
    assert validator.is_valid({"extends": "x.toml"})
    assert validator.is_valid({"extends": "x.toml", "base": {"revision": "x"}})
    assert not validator.is_valid({"extends": 3})
    assert not validator.is_valid({"extends": "x.toml", "base": {"model": 3}})
    assert not validator.is_valid({"extends": "x.toml", "steps": [{"use": "lora-merge"}]})


def test_every_step_is_described(transformations):
    schema = recipe_schema(transformations)
    assert schema["properties"]["steps"]["items"]["oneOf"] == [
        {"$ref": f"#/$defs/steps.{name}"} for name in ("context-extension", "lofit", "lora-merge")
    ]
    step = schema["$defs"]["steps.context-extension"]
    assert step["properties"]["use"] == {"const": "context-extension", "description": "Longer contexts."}
    assert step["properties"]["target_length"] == {"type": "integer", "minimum": 1, "description": "Tokens."}
    assert step["required"] == ["use", "target_length"]
    assert step["additionalProperties"] is False
    assert "null" not in json.dumps(schema)


def test_without_transformations_no_step_is_valid():
    validator = jsonschema.Draft202012Validator(recipe_schema({}))
    assert not validator.is_valid({"base": {"model": "x"}, "steps": [{"use": "x"}]})
    assert validator.is_valid({"base": {"model": "x"}, "output": {"dtype": "float16"}})

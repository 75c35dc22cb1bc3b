# ruff: noqa: E501 - messages stand here as they are printed
"""Loading a recipe: what its values become, its defaults, and a resolved recipe read again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from regraft.core.errors import PluginError, RecipeError
from regraft.core.recipe.load import load_recipe, recipe_from
from regraft.core.recipe.model import Size
from tests.core.recipe.texts import BASE, MERGE


def test_a_recipe_with_everything(load):
    recipe = load("""\
schema = 1
name = "honest"
seed = 7
[base]
model = "org/model"
revision = "v1"
trust_remote_code = true
[[steps]]
use = "context-extension"
target_length = 16384
window = "4k"
layers = [1, 2]
ratio = [2, 1]
limits = { a = 1 }
[[steps]]
id = "heads"
use = "lofit"
data = "/data/qa.jsonl"
select = { kind = "gradient", lr = 1 }
tune.kind = "scale"
tune.heads = 3
[output]
path = "out/honest"
dtype = "bfloat16"
shard_size = "1.5GiB"
quantize = "nf4"
digest = "sha256"
verify = "forward"
""")
    assert (recipe.name, recipe.seed, recipe.path, recipe.folder) == ("honest", 7, Path("r.toml"), Path())
    assert (recipe.base.model, recipe.base.revision, recipe.base.trust_remote_code) == ("org/model", "v1", True)
    extension, heads = recipe.steps
    assert (extension.id, extension.use, extension.position) == (
        "context-extension",
        "context-extension",
        ("r.toml", 8),
    )
    assert (extension.params.window, extension.params.ratio, extension.params.method) == (4096, (2, 1.0), "abf")
    assert (heads.id, heads.use, heads.position.line) == ("heads", "lofit", 15)
    assert (heads.params.select.lr, heads.params.tune.heads, heads.params.data) == (1.0, 3, Path("/data/qa.jsonl"))
    assert recipe.output.path == Path("out/honest")
    assert recipe.output.shard_size == 3 << 29
    assert (recipe.output.quantize, recipe.output.digest, recipe.output.verify) == ("nf4", "sha256", "forward")


def test_defaults(load):
    recipe = load(BASE + MERGE, file="my recipe (2).toml")
    assert recipe.resolved() == {
        "schema": 1,
        "name": "my-recipe-2",
        "seed": 0,
        "base": {"model": "demo:tiny", "trust_remote_code": False},
        "steps": [{"use": "lora-merge", "id": "lora-merge", "adapter": "demo:x", "scale": 1.0}],
        "output": {
            "dtype": "keep",
            "shard_size": 5 * 10**9,
            "quantize": "keep",
            "minimum_cosine": 0.9,
            "digest": "xxh3",
            "verify": "structure",
        },
    }
    assert recipe.output.path is None


def test_recipes_cannot_be_changed(load):
    recipe = load(BASE + MERGE)
    for target in (recipe, recipe.base, recipe.output, recipe.steps[0]):
        with pytest.raises(ValueError, match="frozen"):
            setattr(target, next(iter(type(target).model_fields)), "x")


def test_a_name_is_not_inherited(load):
    Path("parent.toml").write_text('name = "parent"\nseed = 3\n' + BASE + MERGE)
    recipe = load('extends = "parent.toml"\n', file="child.toml")
    assert (recipe.name, recipe.seed) == ("child", 3)
    assert recipe.sources == (Path("child.toml"), Path("parent.toml"))


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ('"5GB"', 5 * 10**9), ('"500MB"', 5 * 10**8), ('"2GiB"', 2 << 30), ("4096", 4096), ('"1B"', 1), ('"0.5 kb"', 500),
        ('"1.5KiB"', 1536), ('"2TB"', 2 * 10**12), ('" 7 TiB "', 7 << 40),
    ],
)  # fmt: skip
def test_shard_sizes(load, size, count):
    assert load(f"output.shard_size = {size}\n{BASE}{MERGE}").output.shard_size == count


def test_only_what_is_used_is_looked_up(inside, transformations):
    class Lazy(dict):
        def __getitem__(self, name):
            assert name == "lora-merge"
            return super().__getitem__(name)

    Path("r.toml").write_text(BASE + MERGE)
    assert len(load_recipe("r.toml", (), Lazy(transformations)).steps) == 1


def test_parameters_without_a_schema_are_a_plugin_fault(inside):
    class Odd:
        pass

    class OddParams(BaseModel):
        model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        odd: Odd | None = None

    class OddMethod:
        Params = OddParams

    Path("r.toml").write_text(BASE + '[[steps]]\nuse = "odd"\n')
    with pytest.raises(PluginError, match="cannot be described by a JSON Schema") as caught:
        load_recipe("r.toml", (), {"odd": OddMethod})
    assert "OddParams" in str(caught.value)


def test_plugins_may_use_sizes(inside):
    class SizedParams(BaseModel):
        model_config = ConfigDict(extra="forbid")
        buffer: Size = 1

    class Sized:
        Params = SizedParams

    Path("r.toml").write_text(BASE + '[[steps]]\nuse = "sized"\nbuffer = "1KiB"\n')
    assert load_recipe("r.toml", (), {"sized": Sized}).steps[0].params.buffer == 1024


def test_a_resolved_recipe_is_a_recipe(load, transformations):
    text = (
        BASE
        + MERGE
        + '[[steps]]\nuse = "lofit"\ndata = "qa.jsonl"\nselect = { kind = "scale", heads = 2 }\n[output]\ndtype = "float16"\n'
    )
    recipe = load(text, "seed=4", file="sub/r.toml")
    resolved = json.loads(json.dumps(recipe.resolved()))
    again = recipe_from(resolved, "sub/lock.json", ["seed=5"], transformations)
    assert again.resolved() == {**resolved, "seed": 5}
    assert again.steps[1].params.data == Path("sub/qa.jsonl")
    assert again.steps[1].position == ("sub/lock.json", None)


def test_a_resolved_recipe_is_validated(transformations):
    def messages(data):
        with pytest.raises(RecipeError) as caught:
            recipe_from(data, "a/lock.json", (), transformations)
        return [str(problem) for problem in caught.value.problems]

    assert messages({"base": {"model": 3}, "steps": [{"use": "lora-merg"}]}) == [
        "a/lock.json: base.model: expected a model (a folder, a .safetensors or .gguf file, or a hub id), found 3",
        'a/lock.json: steps[0].use: there is no transformation "lora-merg" (did you mean "lora-merge"? installed: context-extension, lofit, lora-merge)',
    ]
    assert messages({"extends": "x"}) == ["a/lock.json: extends: only a recipe file can extend another"]
    assert messages({"schema": 3})[0].startswith("a/lock.json: schema: this regraft reads recipes of schema 1, found 3")
    nested = {}
    for _ in range(100):
        nested = {"a": nested}
    assert messages(nested) == ["a/lock.json: tables and arrays go deeper than 64 levels"]


def test_neither_torch_nor_transformers_is_imported(inside):
    Path("r.toml").write_text("sed = 1\n" + BASE)
    script = (
        "import sys\n"
        "from regraft.core.errors import RecipeError\n"
        "from regraft.core.recipe import load, schema, shipped\n"
        "try:\n"
        "    load.load_recipe('r.toml')\n"
        "except RecipeError as error:\n"
        "    print(error)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == 'the recipe has 1 error:\n  r.toml:1:1: sed: unknown key (did you mean "seed"?)\n[]\n'

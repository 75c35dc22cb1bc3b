# ruff: noqa: E501 - messages stand here as they are printed
import datetime

import pytest

from regraft.core.recipe.overrides import OverrideError, parse_override, parse_value

RECIPE = """\
[base]
model = "demo:tiny"
[[steps]]
use = "context-extension"
target_length = 16384
layers = [1, 2]
[[steps]]
id = "honest"
use = "lora-merge"
adapter = "demo:x"
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("32", 32), ("1e-4", 1e-4), ("true", True), ('"32"', "32"), ("[1, 2]", [1, 2]), ("{a = 1}", {"a": 1}),
        ("bfloat16", "bfloat16"), ("", ""), ("a # b", "a # b"), ("1\nx = 2", "1\nx = 2"), ("2024-01-02", datetime.date(2024, 1, 2)),
        ("9" * 5000, "9" * 5000), ("[" * 500, "[" * 500),
    ],
)  # fmt: skip
def test_values_are_toml_or_text(text, value):
    assert parse_value(text) == value


def test_keys_are_dotted_toml_keys():
    override = parse_override(' "a=b" . c.0 = x=y ')
    assert (override.key, override.parts, override.value) == ('"a=b" . c.0', ("a=b", "c", "0"), "x=y")


def test_options_replace_values(load):
    recipe = load(
        RECIPE, "honest.scale=0.5", "output.dtype=bfloat16", "base.model=demo:other", "seed=3", "steps.0.layers.1=7",
        "context-extension.method=yarn", "steps.0.theta=1", "steps.0.theta=2", "name=mine", "output={digest='none'}",
        "output.path=out/x", 'honest.id="renamed"',
    )  # fmt: skip
    extension, merge = recipe.steps
    assert (merge.params.scale, merge.id) == (0.5, "renamed")
    assert (extension.params.layers, extension.params.method, extension.params.theta) == ([1, 7], "yarn", 2.0)
    assert (recipe.base.model, recipe.seed, recipe.name) == ("demo:other", 3, "mine")
    assert (recipe.output.dtype, recipe.output.digest, str(recipe.output.path)) == ("keep", "none", "out/x")


def test_options_set_what_the_recipe_leaves_out(load):
    recipe = load(RECIPE, "context-extension.limits.a.b=1", "context-extension.limits={}", "output.verify=load")
    assert recipe.steps[0].params.limits == {}
    assert recipe.output.verify == "load"


HOW = "(write --set KEY=VALUE, such as --set output.dtype=bfloat16)"
MESSAGES = [
    ("honest.scal=1", '--set honest.scal: unknown key (did you mean "scale"?)'),
    ("honest.scale=x", '--set honest.scale: expected a number, found "x"'),
    ("output.dtype=bf16", '--set output.dtype: expected one of "keep", "bfloat16", "float16" or "float32", found "bf16"'),
    ("output={pth=3}", '--set output: output.pth: unknown key (did you mean "path"?)'),
    ("base.revision=12", """--set base.revision: expected a string that is not empty, found 12 (quote it twice: --set base.revision='"12"')"""),
    ("base.model=", "--set base.model: expected a model, found an empty string"),
    ("seed=-1", "--set seed: expected an integer of at least 0, found -1"),
    ("seed.x=1", "--set seed.x: seed: expected an integer of at least 0, found a table"),
    ("base.model.x=1", '--set base.model.x: base.model is "demo:tiny", which has no keys'),
    ("honst.scale=1", '--set honst.scale: "honst" is neither a step of the recipe nor a top-level key (did you mean "honest"?)'),
    ("ouput.dtype=x", '--set ouput.dtype: "ouput" is neither a step of the recipe nor a top-level key (did you mean "output"?)'),
    (
        "rank=1",
        '--set rank: "rank" is neither a step of the recipe nor a top-level key (keys: name, seed, base, steps, output; steps: context-extension, honest)',
    ),
    ("honest=1", '--set honest: "honest" is a step (name one of its keys: --set honest.KEY=VALUE)'),
    ("steps.2.x=1", '--set steps.2.x: steps is an array of 2 values and has no "2" (numbers count from 0; the last is 1)'),
    ("steps.x=1", '--set steps.x: steps is an array of 2 values and has no "x" (numbers count from 0; the last is 1)'),
    ("extends=x", "--set extends: `extends` cannot be set from the command line (change it in the recipe)"),
    ("schema=1", "--set schema: `schema` cannot be set from the command line (change it in the recipe)"),
    ("=1", f"--set =1: expected a key {HOW}"),
    ("seed", f'--set seed: expected "=" and a value after the key {HOW}'),
    ("a b=1", f'--set a: expected "=" and a value after the key, found "b=1" {HOW}'),
    ("seed=inf", "--set seed: expected a finite number, found inf"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "message"), MESSAGES, ids=[option for option, _ in MESSAGES])
def test_message(problems, option, message):
    assert problems(RECIPE, option) == [message]


def test_all_options_and_the_file_are_checked_at_once(problems):
    text = RECIPE.replace("target_length", "target_lenght")
    assert problems(text, "x=1", "honest.scale=x", "output.x=1") == [
        'r.toml:5:1: steps[0].target_lenght: unknown key (did you mean "target_length"?)',
        '--set honest.scale: expected a number, found "x"',
        "--set output.x: unknown key (known keys: path, dtype, shard_size, format, quantize, minimum_cosine, digest, verify)",
        '--set x: "x" is neither a step of the recipe nor a top-level key (keys: name, seed, base, steps, output; steps: context-extension, honest)',
    ]


def test_a_recipe_without_steps(problems):
    assert problems('base.model = "demo:tiny"\n', "steps.0.x=1") == [
        "--set steps.0.x: the recipe has no steps (add one to the recipe, or set the whole array)"
    ]


def test_depth():
    with pytest.raises(OverrideError, match="deeper than 64"):
        parse_override(".".join("a" * 65) + "=1")
    with pytest.raises(OverrideError, match="deeper than 64"):
        parse_override("a=" + "[" * 65 + "]" * 65)

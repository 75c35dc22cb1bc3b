"""Recipes that are wrong."""

from pathlib import Path

from tests.cli.faults import case, edit, recipe
from tests.running import ABF, recipe_text


@case(2)
def unknown_key_at_the_top():
    recipe("sede = 1\n" + recipe_text("base", ABF, path="out"))


@case(2)
def unknown_key_in_base():
    edit('model = "base"', 'model = "base"\nrevison = "main"')


@case(2)
def unknown_key_in_output():
    edit("[output]", '[output]\ndtpye = "bfloat16"')


@case(2)
def unknown_key_in_a_step():
    edit("target_length = 4096", "target_length = 4096\ntheta = 10000.0")


@case(2)
def key_in_the_wrong_table():
    edit('model = "base"', 'model = "base"\ndtype = "bfloat16"')


@case(2)
def several_faults_at_once():
    recipe('seed = -1\n[base]\nmodel = 3\n[[steps]]\nuse = "context-extenson"\n[output]\ndtype = "bfloat61"\n')


@case(2)
def missing_base():
    recipe(recipe_text("base", ABF, path="out").replace('[base]\nmodel = "base"\n', ""))


@case(2)
def missing_parameter():
    edit("target_length = 4096\n", "")


@case(2)
def missing_use():
    edit('use = "context-extension"\n', "")


@case(2)
def wrong_type():
    edit("4096", '"4096"')


@case(2)
def wrong_size():
    recipe(shard_size="five gigabytes")


@case(2)
def unknown_transformation():
    edit("context-extension", "context-extention")


@case(2)
def unknown_method():
    edit('method = "abf"', 'method = "yarm"')


@case(2)
def parameter_of_another_method():
    edit('method = "abf"', 'method = "abf"\nbeta_fast = 16.0')


@case(2)
def toml_syntax():
    edit('model = "base"', "model = base")


@case(2)
def toml_key_twice():
    edit('model = "base"', 'model = "base"\nmodel = "base"')


@case(2)
def empty_recipe():
    recipe("# nothing yet\n")


@case(2)
def recipe_that_does_nothing():
    recipe(recipe_text("base", path="out"))


@case(2)
def duplicate_step_ids():
    recipe(recipe_text("base", ABF, {**ABF, "target_length": 8192}, path="out"))


@case(2)
def cyclic_extends():
    recipe('extends = "other.toml"\n' + recipe_text("base", ABF, path="out"))
    Path("other.toml").write_text('extends = "recipe.toml"\n')


@case(2)
def extends_of_a_missing_file():
    recipe('extends = "defaults.toml"\n' + recipe_text("base", ABF, path="out"))


@case(2, "apply", "recipe.tml")
def missing_recipe():
    recipe()


@case(2, "apply", "nope/recipe.toml")
def missing_recipe_folder():
    recipe()


@case(2)
def no_output_path():
    recipe(recipe_text("base", ABF))


@case(2, "apply", "recipe.toml", "--set", "outptu.dtype=bfloat16")
def override_of_an_unknown_key():
    recipe()


@case(2, "apply", "recipe.toml", "--set", "output.dtype")
def override_without_a_value():
    recipe()

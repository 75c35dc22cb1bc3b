"""Targets that may not be written, and options that mean nothing."""

import shutil
from pathlib import Path

from tests.adapters import write_adapter
from tests.cli.faults import case, recipe
from tests.running import ABF, recipe_text


@case(2)
def target_that_is_not_empty():
    recipe()
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("do not lose")


@case(2, "apply", "recipe.toml", "--force")
def forced_target_that_is_no_checkpoint():
    recipe()
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("do not lose")


@case(2)
def target_that_is_a_file():
    recipe()
    Path("out").write_text("do not lose")


@case(2, "apply", "recipe.toml", "--force")
def target_equal_to_the_base():
    recipe(path="base")


@case(2, "apply", "recipe.toml", "--force")
def target_inside_the_base():
    recipe(path="base/out")


@case(2, "apply", "recipe.toml", "--force")
def base_inside_the_target():
    shutil.copytree("base", "models/base")
    recipe(recipe_text("models/base", ABF, path="models"))


@case(2, "apply", "out/recipe.toml", "--output", "out", "--force")
def recipe_inside_the_target():
    shutil.copytree("base", "out")
    Path("out/recipe.toml").write_text(recipe_text("../base", ABF))


@case(2, "apply", "recipe.toml", "--force")
def target_equal_to_the_adapter():
    write_adapter("adapter")
    recipe(recipe_text("base", {"use": "lora-merge", "adapter": "adapter"}, path="adapter"))


@case(2, "apply", "recipe.toml", "--force")
def target_that_is_the_base_by_a_link():
    Path("alias").symlink_to("base")
    recipe(path="alias")


@case(2)
def target_inside_a_file():
    Path("notes").write_text("do not lose")
    recipe(path="notes/out")


@case(2, "apply", "recipe.toml", "--save-patches", "out/patches")
def patches_inside_the_target():
    recipe()


@case(2, "apply", "recipe.toml", "--save-patches", "patches")
def patches_that_are_there_already():
    recipe()
    Path("patches/context-extension.regraft").mkdir(parents=True)


@case(2, "apply", "recipe.toml", "--device", "gpu")
def unknown_device():
    recipe()


@case(4, "apply", "recipe.toml", "--device", "cuda:9")
def device_that_is_not_there():
    recipe(dtype="bfloat16")


@case(2, "apply", "recipe.toml", "--verify", "deep")
def unknown_verify_depth():
    recipe()


@case(2, "verify", "base", "--depth", "deep")
def unknown_depth():
    pass


@case(3, "verify", "nope")
def verify_of_a_missing_folder():
    pass


@case(3, "inspect", "base/config.json")
def inspect_of_a_file_that_is_no_checkpoint():
    pass


@case(3, "diff", "base", "./nope")
def diff_with_a_missing_folder():
    pass


@case(2, "recipes", "show", "nope")
def unknown_shipped_recipe():
    pass

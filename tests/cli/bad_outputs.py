"""Outputs that cannot be reproduced or pushed, and options of the cache that mean nothing."""

import shutil
from pathlib import Path

from tests.cli.faults import case, recipe
from tests.running import done


def output():
    recipe()
    done("apply", "recipe.toml", "--no-durable")


@case(3, "reproduce", "base")
def reproduce_without_a_lock_file():
    pass


@case(3, "reproduce", "out")
def reproduce_without_its_base():
    output()
    shutil.rmtree("base")


@case(3, "reproduce", "out")
def reproduce_with_another_base():
    output()
    Path("base/merges.txt").write_text("other")


@case(2, "reproduce", "out", "--data", "x.jsonl")
def reproduce_with_data_for_no_key():
    output()


@case(2, "reproduce", "out", "--data", "context-extension.corpus=x.jsonl")
def reproduce_with_data_for_an_unknown_key():
    output()


@case(2, "push", "out", "org/model")
def push_without_a_known_licence():
    output()


@case(2, "push", "out", "org/model", "--license", "Do What You Want")
def push_with_a_licence_that_is_none():
    output()


@case(2, "push", "out", "org/model", "--license", "mit")
def push_with_another_licence_than_the_base():
    Path("base/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    output()


@case(2, "push", "out", "no such/id/at all", "--license", "mit")
def push_to_what_is_no_hub_id():
    output()


@case(3, "push", "base", "org/model")
def push_of_a_folder_that_regraft_did_not_write():
    pass


@case(2, "apply", "recipe.toml", "--private")
def push_options_without_a_repository():
    recipe()


@case(2, "cache", "prune", "--older-than", "yesterday")
def age_that_is_none():
    pass


@case(2, "cache", "prune", "--max-size", "plenty")
def cache_size_that_is_none():
    pass

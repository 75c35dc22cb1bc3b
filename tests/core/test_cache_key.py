"""What a step's key in the cache is made of: what reruns after a change, and what has no key."""

import importlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from regraft.core.cache import kept_steps
from regraft.core.cache_key import step_keys
from regraft.core.execute import apply, prepare
from regraft.core.recipe.load import load_recipe
from tests.adapters import write_adapter
from tests.core.learning import HOST, ONE, RAN, THREE, TWO, Learn, no_cache, run
from tests.running import ABF


def test_a_change_of_step_k_reruns_k_to_n_and_no_other(cache):
    assert run(ONE, TWO, THREE)[0] == ["one", "two", "three"]
    assert run(ONE, TWO, THREE)[0] == []
    ran, told = run(ONE, {**TWO, "factor": 3.0}, THREE)
    assert ran == ["two", "three"]
    assert told == ["one: from the cache"]
    assert run(ONE, TWO, {**THREE, "factor": 3.0})[0] == ["three"]
    assert run(ONE, TWO)[0] == []
    assert run(TWO, ONE)[0] == ["two", "one"], "another order is another chain"
    assert run(ONE, {**ABF, "id": "longer"}, TWO)[0] == ["two"], "a weight-space step between is part of the key"
    assert run(ONE, {**ABF, "id": "longer", "target_length": 512}, TWO)[0] == ["two"]


def test_weights_that_change_in_place_are_another_base(cache):
    """Also with the size and the time of change that they had, as `cp -p` and unpacked archives leave them."""
    run(ONE)
    assert run(ONE)[0] == []
    path = Path("base/model-00001-of-00006.safetensors")
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(ONE)[0] == ["one"]


def test_a_copy_of_the_base_elsewhere_is_the_same_base(cache):
    run(ONE)
    shutil.copytree("base", "moved")
    assert run(ONE, base="moved")[0] == []


def test_contents_of_data_and_files_are_part_of_the_key_and_their_folder_is_not(cache):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "x.jsonl").write_text('{"text": "one"}\n')
        Path(folder, "notes").mkdir()
        Path(folder, "notes/n.txt").write_text("note")
    step = {**ONE, "data": "a/x.jsonl", "notes": "a/notes"}
    assert run(step)[0] == ["one"]
    assert run({**ONE, "data": "b/x.jsonl", "notes": "b/notes"})[0] == []
    Path("b/notes/n.txt").write_text("other")
    assert run({**ONE, "data": "b/x.jsonl", "notes": "b/notes"})[0] == ["one"]
    Path("a/x.jsonl").write_text('{"text": "two"}\n')
    assert run(step)[0] == ["one"]


def test_a_data_set_of_the_hub_has_no_key_and_neither_has_what_follows(cache):
    steps = ({**ONE, "data": "org/rows"}, TWO)
    assert run(*steps)[0] == ["one", "two"]
    ran, told = run(*steps)
    assert ran == ["one", "two"]
    assert told == [
        f"{name}: not kept in the cache: the contents of the data set org/rows cannot be known without fetching it"
        for name in ("one", "two")
    ]


def test_a_step_that_rests_on_what_nobody_names_is_not_kept(cache):
    step = {**ONE, "unrecorded": "the encoder org/eyes"}
    assert run(step)[0] == ["one"]
    assert run(step) == (["one"], [
        "one: not kept in the cache: the encoder org/eyes is named by neither recipe nor base"
    ])  # fmt: skip


def test_a_log_is_no_part_of_the_key_and_a_hit_says_that_it_stays_unwritten(cache):
    run(ONE)
    ran, told = run({**ONE, "log": "log.jsonl"})
    assert (ran, told) == ([], ["one: from the cache; nothing is written to log"])


def test_seed_strictness_and_versions_are_parts_of_the_key(cache, monkeypatch):
    run(ONE)
    assert run(ONE, options=replace(no_cache(), cache=True, strict=True))[0] == ["one"]
    monkeypatch.setattr(Learn, "version", "2")
    assert run(ONE)[0] == ["one"]
    monkeypatch.setattr("regraft.core.cache_key.package_version", lambda name: "9" if name == "torch" else "1")
    assert run(ONE)[0] == ["one"]
    text = Path("r.toml").read_text()
    Path("r.toml").write_text(f"seed = 5\n{text}")
    RAN.clear()
    recipe = load_recipe(Path("r.toml"), (), HOST.transformations(), HOST.broken)
    apply(recipe, Path("out"), HOST, replace(no_cache(), cache=True))
    assert RAN == ["one"]


def test_the_number_of_torch_threads_is_part_of_the_key_where_the_cpu_computes(cache, monkeypatch):
    """`plan` imports no torch to ask: it goes by the environment, or by the entry that was used last."""
    number = torch.get_num_threads()
    run(ONE)
    try:
        torch.set_num_threads(number + 1)
        assert run(ONE)[0] == ["one"]
        assert run(ONE)[0] == []
    finally:
        torch.set_num_threads(number)
    assert run(ONE)[0] == []
    recipe = load_recipe(Path("r.toml"), (), HOST.transformations(), HOST.broken)
    plan, _ = prepare(recipe, HOST, no_cache())
    for given, kept in ((str(number), ["one"]), (str(number + 1), ["one"]), (str(number + 2), []), ("", ["one"])):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert kept_steps(plan) == kept
    keys = [step_keys(plan, cache, "cpu", threads)[0].key for threads in (None, 1, 2)]
    assert len({None, *keys}) == 4


def test_code_that_changes_under_the_same_version_is_another_step(cache, tmp_path, monkeypatch):
    from regraft.core.cache_key import code_digest

    run(ONE)
    assert run(ONE)[0] == []
    monkeypatch.setattr("regraft.core.cache_key.code_digest", lambda name: code_digest(name) + name.partition(".")[0])
    assert run(ONE)[0] == ["one"]


def test_code_in_a_namespace_is_told_by_the_package_below_it(tmp_path, monkeypatch):
    """A namespace such as a company's has no `__init__.py`; its name alone would know no change of code."""
    from regraft.core.cache_key import _package, code_digest

    home = tmp_path / "some_company/thin_layers"
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("from some_company.thin_layers.steps import Thin\n")
    (home / "steps.py").write_text("class Thin:\n    factor = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = _package(importlib.import_module("some_company.thin_layers").Thin)
    assert name == "some_company.thin_layers"
    before = code_digest.__wrapped__(name)
    (home / "steps.py").write_text("class Thin:\n    factor = 2\n")
    assert code_digest.__wrapped__(name) != before


def test_cheap_steps_are_not_kept(cache, monkeypatch):
    """A step that needs no memory of its own makes its patch again in no time, so the base is not read for it."""
    monkeypatch.setattr("regraft.core.cache_key.checkpoint_digest", None)
    write_adapter("adapter")
    run({"use": "lora-merge", "adapter": "adapter"}, ABF)
    assert cache.entries() == []


def test_digests_of_settled_weights_are_remembered(cache, monkeypatch):
    from regraft.core import cache_key

    monkeypatch.setattr(cache_key, "_SETTLED_SECONDS", 0.0)
    time.sleep(0.01)
    run(ONE)
    assert len(list(cache.weights.iterdir())) == 6
    monkeypatch.setattr(cache_key, "hash_range", None)
    assert run(TWO)[0] == ["two"]

"""`regraft cache`, and what `plan` and `apply` say of it; with a step that works by itself."""

import os
from pathlib import Path

import pytest

from regraft.core.cache_folder import CacheFolder
from tests.core.learning import HOST, ONE, TWO
from tests.running import done, regraft, write_recipe


@pytest.fixture
def recipe(workplace, monkeypatch):
    monkeypatch.setenv("REGRAFT_CACHE", "cache")
    monkeypatch.delenv("REGRAFT_CACHE_SIZE")
    monkeypatch.setattr("regraft.core.host.host", lambda: HOST)
    return write_recipe(Path("r.toml"), "base", ONE, TWO, path="out")


def apply(recipe, *options):
    return done("apply", recipe, "--force", "--no-durable", "--device", "cpu", *options)


def test_apply_and_plan_say_what_comes_from_the_cache(recipe):
    assert "(from the cache)" not in done("plan", recipe).out
    assert apply(recipe).err == ""
    plan = done("plan", recipe)
    assert "  one: Changes something of everything. (from the cache)" in plan.out.splitlines()
    assert done("plan", recipe, "--json").json["cached"] == ["one", "two"]
    ran = apply(recipe)
    assert ran.err.splitlines() == ["one: from the cache", "two: from the cache"]
    assert apply(recipe, "--json").json["cached"] == ["one", "two"]
    assert apply(recipe, "--no-cache").err == ""


def test_list_path_and_clear(recipe):
    assert done("cache").out == "0 results, 0 bytes of at most 20 GB in cache\n"
    apply(recipe)
    lines = done("cache", "list").out.splitlines()
    assert lines[0].split() == ["key", "step", "use", "recipe", "base", "size", "took", "last", "used"]
    assert lines[1].split()[1:5] == ["two", "learn", "r", "base"]
    assert lines[-1].startswith("2 results, ")
    listed = done("cache", "list", "--json").json
    assert [entry["step"] for entry in listed["entries"]] == ["two", "one"]
    assert listed["bytes"] == sum(entry["bytes"] for entry in listed["entries"]) == CacheFolder(Path("cache")).nbytes()
    assert done("cache", "path").out == "cache\n"
    assert done("cache", "clear").out.startswith("removed 2 of 2: ")
    assert done("cache", "list", "--json").json["entries"] == []


def test_prune_by_age_and_by_size(recipe):
    apply(recipe)
    cache = CacheFolder(Path("cache"))
    newest, oldest = cache.entries()
    os.utime(cache.entry(oldest), (1, 1))
    assert done("cache", "prune", "--json").json["removed"] == 0
    assert done("cache", "prune", "--older-than", "2w", "--json").json["removed"] == 1
    assert cache.entries() == [newest]
    assert done("cache", "prune", "--max-size", "1GB", "--json").json["removed"] == 0
    assert done("cache", "prune", "--max-size", "0", "--json").json == {
        "schema": 1, "folder": "cache", "removed": 1, "left": 0, "freed_bytes": pytest.approx(30_000, rel=0.9),
    }  # fmt: skip


def test_verify_finds_damage_and_removes_it(recipe):
    apply(recipe)
    assert done("cache", "verify").out == "2 of 2 sound in cache\n"
    cache = CacheFolder(Path("cache"))
    key = cache.entries()[0]
    (cache.entry(key) / "reports/loss.txt").write_text("0.2\n")
    ran = regraft("cache", "verify")
    assert ran.code == 1
    assert f"damaged: {key[:16]}: reports/loss.txt has changed" in ran.out
    assert "remedy: remove them: regraft cache verify --remove" in ran.err
    (cache.entry(key) / "entry.json").write_text("{")
    assert key[:16] + "  damaged" in done("cache", "list").out
    assert done("cache", "verify", "--remove", "--json").json["removed"] == [key]
    assert done("cache", "verify").out == "1 of 1 sound in cache\n"

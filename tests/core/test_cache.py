"""The step cache: what a hit gives, what is kept, and that nothing about the cache can spoil a run."""

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from regraft.core.cache import _all_have, kept_steps
from regraft.core.cache_folder import CacheFolder, cache_folder
from regraft.core.errors import UsageError
from regraft.core.execute import ApplyOptions, prepare
from regraft.core.processes import Processes
from regraft.core.recipe.load import load_recipe
from tests.adapters import write_adapter
from tests.core.learning import GATE, HOST, ONE, RAN, THREE, TWO, no_cache, run
from tests.running import ABF, tree


@pytest.mark.parametrize("output", [{}, {"dtype": "bfloat16"}, {"digest": "sha256", "quantize": "nf4"}])
def test_a_hit_gives_the_same_bytes_lock_file_too(cache, output):
    """After a step that computes tensors, too, whose inputs the lock file states."""
    write_adapter("adapter")
    steps = ({"use": "lora-merge", "adapter": "adapter"}, ONE, TWO)
    run(*steps, out="without", options=no_cache(), **output)
    assert cache.entries() == []
    assert run(*steps, out="first", **output)[0] == ["one", "two"]
    ran, told = run(*steps, out="second", **output)
    assert (ran, told) == ([], ["one: from the cache", "two: from the cache"])
    assert tree(Path("without")) == tree(Path("first")) == tree(Path("second"))
    assert json.loads(Path("second/regraft.lock.json").read_text())["base"]["tensors"][GATE]
    assert Path("second/regraft/two/loss.txt").read_text() == "0.1\n"


def test_a_quantised_base_stays_quantised_on_a_hit(cache):
    run(ABF, out="nf4", quantize="nf4")
    step = {**ONE, "formulas": True}
    assert run(step, base="nf4", out="first", minimum_cosine=-1.0)[0] == ["one"]
    assert run(step, base="nf4", out="second", minimum_cosine=-1.0)[0] == []
    assert tree(Path("first")) == tree(Path("second"))
    told = run(ONE, base="nf4", minimum_cosine=-1.0)[1]
    assert told == ["one: not kept in the cache: the base is quantised, and the step's formulas cannot be stored"]


@pytest.mark.parametrize("name", ["patch/tensors.safetensors", "patch/patch.json", "reports/loss.txt", "entry.json"])
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_damaged_entry_is_named_dropped_and_computed_again(cache, name, how):
    run(ONE, out="first")
    (key,) = cache.entries()
    path = cache.entry(key) / name
    if how == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    ran, told = run(ONE, out="second")
    assert ran == ["one"]
    assert len(told) == 1
    assert told[0].startswith(f"warning: one: the cache entry {key[:16]} is damaged (")
    assert run(ONE, out="third")[0] == []
    assert tree(Path("first")) == tree(Path("second")) == tree(Path("third"))


def test_what_is_not_finite_fails_on_a_hit_too(cache):
    from regraft.core.errors import TransformationError

    for _ in range(2):
        with pytest.raises(TransformationError, match="not finite"):
            run({**ONE, "spoil": True})
    assert RAN == [], "the second time it came from the cache"


def test_the_oldest_entries_make_room_and_what_is_too_large_is_not_kept(cache, monkeypatch):
    run(ONE)
    first = cache.entries()[0]
    size = cache.nbytes()
    os.utime(cache.entry(first), (1, 1))
    monkeypatch.setenv("REGRAFT_CACHE_SIZE", str(int(size * 2.5)))
    run(TWO)
    assert len(cache.entries()) == 2
    run(THREE)
    assert len(cache.entries()) == 2
    assert first not in cache.entries()
    monkeypatch.setenv("REGRAFT_CACHE_SIZE", "1kB")
    ran, told = run({**ONE, "factor": 9.0})
    assert ran == ["one"]
    assert "REGRAFT_CACHE_SIZE" in told[0]


def test_an_entry_in_use_is_not_removed(cache):
    run(ONE)
    (key,) = cache.entries()
    held = cache.hold(key)
    assert not cache.remove(key)
    del held
    assert cache.remove(key)
    assert cache.entries() == []


def raises_no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_cache_that_cannot_be_written_costs_a_warning(cache, monkeypatch):
    Path("cache").write_text("a file")
    ran, told = run(ONE)
    assert ran == ["one"]
    assert told == ["warning: no cache: cache: Not a directory"]
    Path("cache").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "steps")
    assert run(ONE)[1] == ["warning: no cache: cache: it cannot be written"]
    monkeypatch.setenv("REGRAFT_CACHE", "~nobody-of-that-name/cache")
    assert run(ONE)[1] == ["warning: no cache: there is no home folder for the cache"]
    monkeypatch.delenv("REGRAFT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", raises_no_home)
    assert run(ONE)[1] == ["warning: no cache: there is no home folder for the cache"]


def test_a_full_disk_costs_a_warning_and_leaves_nothing(cache, monkeypatch):
    from tests.helpers import raising

    monkeypatch.setattr("regraft.core.cache_entry.save_patch", raising(28))
    ran, told = run(ONE)
    assert ran == ["one"]
    assert told == ["warning: one: not kept in the cache cache: No space left on device"]
    assert list(cache.steps.iterdir()) == []


def test_turned_off_it_neither_reads_nor_writes(cache, monkeypatch):
    run(ONE)
    assert run(ONE, options=no_cache())[0] == ["one"]
    monkeypatch.setenv("REGRAFT_CACHE_SIZE", "0")
    assert run(ONE)[0] == ["one"]
    shutil.rmtree("cache")
    assert run(ABF)[1] == []
    assert not Path("cache").exists()


def test_plan_says_what_is_there(cache, monkeypatch):
    steps = (ONE, TWO)
    run(*steps)
    recipe = load_recipe(Path("r.toml"), (), HOST.transformations(), HOST.broken)
    plan, _ = prepare(recipe, HOST, ApplyOptions())
    assert kept_steps(plan) == ["one", "two"]
    run({**ONE, "factor": 5.0}, TWO)
    cache.remove(cache.entries()[0])
    plan, _ = prepare(load_recipe(Path("r.toml"), (), HOST.transformations(), HOST.broken), HOST, ApplyOptions())
    assert kept_steps(plan) == ["one"]
    with monkeypatch.context() as changed:
        changed.setattr(os, "access", lambda path, mode: Path(path).name != "steps")
        assert kept_steps(plan) == [], "apply does without a cache that it cannot write"
    monkeypatch.setattr("regraft.core.cache._CHEAP_BYTES", 1)
    assert kept_steps(plan) == [], "files that have just changed would have to be read"


def _apply_at_once(out, start, told):
    start.wait()
    told.put(run(ONE, TWO, out=out)[0])


def test_two_runs_at_once(cache):
    context = multiprocessing.get_context("fork")
    start, told = context.Event(), context.Queue()
    both = [context.Process(target=_apply_at_once, args=(out, start, told)) for out in ("a", "b")]
    for process in both:
        process.start()
    start.set()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert tree(Path("a")) == tree(Path("b"))
    assert len(cache.entries()) == 2
    assert len(list(cache.steps.iterdir())) == 2
    assert run(ONE, TWO, out="c")[0] == []
    assert tree(Path("c")) == tree(Path("a"))


def test_what_a_killed_run_left_is_swept(cache):
    run(ONE)
    left = cache.steps / ".0123.1.2"
    left.mkdir()
    cache.make_room(0)
    assert not left.exists()
    assert len(cache.entries()) == 1


def test_what_others_keep_in_the_folder_stays(cache):
    """`REGRAFT_CACHE` may name a folder of work, whose `weights` and `steps` are not the cache's."""
    theirs = [cache.weights / "llama/model.safetensors", cache.steps / "mine/a", cache.steps / ".git/config"]
    for path in theirs:
        path.parent.mkdir(parents=True)
        path.write_text("precious")
    run(ONE)
    (key,) = cache.entries()
    digest = cache.weights / key
    digest.write_text("0" * 32)
    cache.forget_weights()
    replace(cache, limit=0).make_room(0)
    assert cache.entries() == []
    assert cache.nbytes() == 0
    assert not digest.exists()
    assert [path.read_text() for path in theirs] == ["precious"] * 3


def test_where_the_cache_is():
    assert cache_folder({"REGRAFT_CACHE": "/x", "REGRAFT_CACHE_SIZE": "3GB"}) == CacheFolder(Path("/x"), 3 * 10**9)
    assert cache_folder({"XDG_CACHE_HOME": "/y"}) == CacheFolder(Path("/y/regraft"))
    assert cache_folder({"XDG_CACHE_HOME": "relative"}).path == Path.home() / ".cache/regraft"
    assert cache_folder({"REGRAFT_CACHE_SIZE": "0"}).limit == 0
    with pytest.raises(UsageError, match="not a size"):
        cache_folder({"REGRAFT_CACHE_SIZE": "plenty"})


@pytest.mark.parametrize(("have", "used"), [((True, True), True), ((True, False), False), ((False, False), False)])
def test_processes_use_an_entry_together_or_not_at_all(monkeypatch, have, used):
    """Those that compute together would wait for each other forever if one of them took the result from the cache."""
    from torch.distributed import HashStore

    shared = HashStore()
    monkeypatch.setattr("regraft.core.cache.store", lambda: shared)
    monkeypatch.setattr("regraft.core.processes.store", lambda: shared)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(_all_have, Processes(rank, 2), "cache 0", mine) for rank, mine in enumerate(have)]
        assert [one.result(timeout=30) for one in both] == [used, used]

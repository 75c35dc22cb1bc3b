"""The step cache: what reruns after a change, what a hit gives, and that nothing about the cache can spoil a run."""

import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from regraft.core.cache import _all_have, kept_steps
from regraft.core.cache_folder import CacheFolder, cache_folder
from regraft.core.checkpoint import FileRef
from regraft.core.data.settings import Data
from regraft.core.errors import UsageError
from regraft.core.execute import ApplyOptions, Events, apply, prepare
from regraft.core.operations import Operation, ScaleRows, Value
from regraft.core.patch import Edit, Outline, Patch
from regraft.core.processes import Processes
from regraft.core.recipe.load import load_recipe
from regraft.core.recipe.references import OutputPath
from regraft.core.tensors import MemoryTensor
from regraft.core.transformation import Params, Transformation
from tests.adapters import write_adapter
from tests.plugin_host import host_with
from tests.running import ABF, recipe_text, tree

NORM, HEAD, GATE = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"
RAN = []


class Negate(Operation):
    """-x; it has no kind, so that it is kept by its values."""

    inputs = (GATE,)

    def prepare(self, device):
        return lambda start, stop, rows: -rows.float()


class LearnParams(Params):
    factor: float = 2.0
    data: Data | None = None
    notes: Path | None = None
    log: OutputPath | None = None
    spoil: bool = False
    formulas: bool = False
    unrecorded: str = ""


class Learn(Transformation[LearnParams]):
    """Every way of changing a checkpoint: a value, a formula, an operation without a kind, a tensor carried through,
    JSON, files, reports; and it counts its calls."""

    name = "learn"
    summary = "Changes something of everything."
    Params = LearnParams

    def plan(self, checkpoint, params):
        names = (NORM, HEAD, "lm_head.weight") if params.formulas else (NORM, HEAD, GATE, "lm_head.weight")
        specs = {name: checkpoint.specs[name] for name in names if name in checkpoint.specs}
        return Outline(specs=specs, files={"extra.txt": 3}, json={"config.json": {"rope_theta": 7.0}},
                       workspace_bytes=1, unrecorded=params.unrecorded)  # fmt: skip

    def apply(self, checkpoint, params, run):
        import torch

        RAN.append(run.step)
        specs = checkpoint.specs
        fill = float("nan") if params.spoil else params.factor
        values = MemoryTensor(NORM, torch.full(specs[NORM].shape, fill) * checkpoint.load(NORM))
        factors = MemoryTensor("factors", torch.full((specs[HEAD].rows,), params.factor))
        edits = {
            NORM: Edit(specs[NORM], Value(values)),
            HEAD: Edit(specs[HEAD], ScaleRows(HEAD, factors)),
        }
        if not params.formulas:
            edits[GATE] = Edit(specs[GATE], Negate())
        if "lm_head.weight" in specs:
            edits["lm_head.weight"] = Edit(specs["lm_head.weight"], Value(checkpoint.tensor("lm_head.weight")))
        return Patch(
            edits=edits, json={"config.json": {"rope_theta": 7.0}}, files={"extra.txt": FileRef(data=b"abc")},
            metrics={"loss": 0.1, "pair": (1, 2.5)}, notes=("learnt",), reports={"loss.txt": FileRef(data=b"0.1\n")},
        )  # fmt: skip


HOST = host_with(Learn)
ONE, TWO, THREE = ({"use": "learn", "id": name} for name in ("one", "two", "three"))


@pytest.fixture
def cache(workplace, monkeypatch):
    """An empty cache in the current folder; nothing has run yet."""
    monkeypatch.setenv("REGRAFT_CACHE", "cache")
    monkeypatch.delenv("REGRAFT_CACHE_SIZE")
    RAN.clear()
    return CacheFolder(Path("cache"))


def run(*steps, base="base", out="out", host=HOST, options=None, **output):
    """Apply; gives the ids of the steps that ran, and the lines that were told."""
    Path("r.toml").write_text(recipe_text(base, *steps, path=out, **output))
    recipe = load_recipe(Path("r.toml"), (), host.transformations(), host.broken)
    RAN.clear()
    told = []
    options = options or ApplyOptions(device="cpu", durable=False, force=True)
    apply(recipe, Path(out), host, options, Events(say=told.append))
    return list(RAN), told


def no_cache():
    return ApplyOptions(device="cpu", durable=False, force=True, cache=False)


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


def test_code_that_changes_under_the_same_version_is_another_step(cache, tmp_path, monkeypatch):
    from regraft.core.cache_key import code_digest

    run(ONE)
    assert run(ONE)[0] == []
    monkeypatch.setattr("regraft.core.cache_key.code_digest", lambda name: code_digest(name) + name.partition(".")[0])
    assert run(ONE)[0] == ["one"]


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


def test_cheap_steps_are_not_kept(cache, monkeypatch):
    """A step that needs no memory of its own makes its patch again in no time, so the base is not read for it."""
    monkeypatch.setattr("regraft.core.cache_key.checkpoint_digest", None)
    write_adapter("adapter")
    run({"use": "lora-merge", "adapter": "adapter"}, ABF)
    assert cache.entries() == []


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
    monkeypatch.setattr("regraft.core.cache._CHEAP_BYTES", 1)
    assert kept_steps(plan) == [], "files that have just changed would have to be read"


def test_digests_of_settled_weights_are_remembered(cache, monkeypatch):
    from regraft.core import cache_key

    monkeypatch.setattr(cache_key, "_SETTLED_SECONDS", 0.0)
    time.sleep(0.01)
    run(ONE)
    assert len(list(cache.weights.iterdir())) == 6
    monkeypatch.setattr(cache_key, "hash_range", None)
    assert run(TWO)[0] == ["two"]


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

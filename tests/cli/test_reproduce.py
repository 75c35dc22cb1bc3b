"""`regraft reproduce`: the same bytes, or the list of what differs and why that may be."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from regraft.core.environment import differences
from tests.adapters import write_adapter
from tests.core.learning import HOST, ONE, RAN, Learn
from tests.running import ABF, done, regraft, tree, write_recipe

LOCK = "regraft.lock.json"


@pytest.fixture
def made(workplace, monkeypatch):
    """The output of a recipe with an adapter, a step that reads data, and a report; its inputs in other folders."""
    monkeypatch.setattr("regraft.core.host.host", lambda: HOST)
    Path("recipes/data").mkdir(parents=True)
    Path("recipes/data/x.jsonl").write_text('{"text": "one"}\n')
    shutil.move("base", "recipes/base")
    Path("adapters").mkdir()
    write_adapter("adapters/one")
    steps = [
        {"use": "lora-merge", "adapter": "../adapters/one"},
        {**ONE, "data": "data/x.jsonl", "log": "log.jsonl"},
        ABF,
    ]
    write_recipe(Path("recipes/r.toml"), "base", *steps, path="out")
    done("apply", "recipes/r.toml", "--no-durable")
    RAN.clear()
    return Path("out")


def edit(change):
    path = Path("out", LOCK)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def put(*place, value):
    """A change of a lock file: `value` at `place`; None removes what is there."""

    def change(lock):
        for key in place[:-1]:
            lock = lock[key]
        lock[place[-1]] = value
        if value is None:
            del lock[place[-1]]

    return change


def test_the_same_bytes_wherever_the_inputs_are(made, tmp_path, monkeypatch):
    before = tree(tmp_path)
    ran = done("reproduce", "out", "--inputs", "recipes")
    assert ran.out == f"out/{LOCK}: reproduced: 21 tensors and 9 files have the recorded bytes\n"
    assert RAN == ["one"], "it ran, from no cache"
    assert tree(tmp_path) == before, "nothing is left"
    shutil.move("recipes/base", "elsewhere")
    shutil.move("recipes/data/x.jsonl", "x.jsonl")
    where = ["--base", "elsewhere", "--data", "lora-merge.adapter=adapters/one", "--data", "one.data=x.jsonl"]
    ran = done("reproduce", f"out/{LOCK}", *where, "--out", "again", "--json")
    assert ran.json["reproduced"] is True
    assert ran.json["output"] == "again"
    assert {name: digest for name, digest in tree(Path("again")).items() if name != LOCK} == {
        name: digest for name, digest in tree(made).items() if name != LOCK
    }


def test_an_adapter_and_a_shipped_recipe_need_no_options(workplace):
    lora = {"use": "lora-merge", "adapter": "adapter"}
    write_adapter("adapter")
    done("apply", write_recipe(Path("r.toml"), "base", lora, path="out", format="adapter"))
    assert "reproduced" in done("reproduce", "out").out
    done("apply", "quickstart", "-o", "demo")
    assert done("reproduce", "demo", "--json").json["findings"] == []


def test_torch_computes_with_the_recorded_number_of_threads(made, monkeypatch):
    number, seen = torch.get_num_threads(), []
    assert json.loads((made / LOCK).read_text())["environment"]["torch_threads"] == number
    learn = Learn.apply

    def watched(*given):
        seen.append(torch.get_num_threads())
        return learn(*given)

    monkeypatch.setattr(Learn, "apply", watched)
    edit(put("environment", "torch_threads", value=number + 1))
    ran = done("reproduce", "out", "--inputs", "recipes", "--json")
    assert (seen, torch.get_num_threads()) == ([number + 1], number)
    assert ran.json["environment"] == []
    assert f"the recorded number of threads, {number + 1}, in place of {number}" in ran.err
    edit(put("environment", "torch_threads", value=None))
    ran = done("reproduce", "out", "--inputs", "recipes")
    assert ran.out.startswith(f"environment: torch threads: recorded none, now {number}: can change weights\n")
    assert seen[1:] == [number]


def test_weight_space_steps_record_no_threads(workplace):
    done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out", dtype="float16"), "--no-durable")
    assert "torch_threads" not in json.loads(Path("out", LOCK).read_text())["environment"]


def test_what_differs_is_listed_with_what_may_be_the_cause(made):
    def change(lock):
        lock["output"]["tensors"]["model.norm.weight"]["digest"] = "xxh3:0"
        lock["output"]["tensors"]["gone"] = {"dtype": "F32", "shape": [1], "file": "x", "digest": "xxh3:1"}
        lock["output"]["files"]["README.md"]["sha256"] = "0"
        del lock["output"]["files"]["config.json"]
        lock["environment"]["packages"]["torch"] = "1.0"
        lock["environment"]["system"] = "Plan 9"

    edit(change)
    ran = regraft("reproduce", "out", "--inputs", "recipes")
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0].startswith("environment: torch: recorded 1.0, now ")
    assert lines[0].endswith(": can change weights")
    assert lines[1] == "environment: system: recorded Plan 9, now Linux: changes no byte"
    differing = [line for line in lines if line.startswith("difference: ")]
    assert [line.split(":")[1].strip() for line in differing] == [
        "model.norm.weight",
        "gone",
        "README.md",
        "config.json",
    ]
    assert lines[-1].endswith("not reproduced: 20 tensors and 7 files have the recorded bytes")
    assert "not reproduced: 4 differences" in ran.err
    assert "found: an environment with another torch" in ran.err


@pytest.mark.parametrize(
    ("arrange", "named"),
    [
        (lambda: Path("recipes/data/x.jsonl").write_text("other"), "one.data.source[0]: "),
        (lambda: Path("recipes/data/x.jsonl").unlink(), "one.data.source: there is no data/x.jsonl in recipes"),
        (lambda: shutil.rmtree("adapters/one"), "lora-merge.adapter: there is no ../adapters/one in recipes"),
        (lambda: Path("recipes/base/notes.txt").write_text("new"), "base: its config, other files or shapes"),
        (lambda: shutil.rmtree("recipes/base"), "base: "),
    ],
)
def test_missing_and_other_inputs_are_named_before_anything_runs(made, arrange, named):
    arrange()
    ran = regraft("reproduce", "out", "--inputs", "recipes")
    assert ran.code == 3
    assert named in ran.err
    assert "remedy: say where the inputs are: --base PATH" in ran.err
    assert RAN == []


def test_homes_of_others_are_paths_that_are_not_there(made):
    """A record names its inputs as its recipe did, whoever's home that was."""
    for place in (["base", "model"], ["recipe", "base", "model"], ["recipe", "steps", 0, "adapter"]):
        edit(put(*place, value="~nobody-of-that-name/x"))
    ran = regraft("reproduce", "out", "--inputs", "recipes", "--data", "one.data=~nobody-of-that-name/y")
    assert ran.code == 3
    assert "lora-merge.adapter: there is no ~nobody-of-that-name/x in recipes" in ran.err
    assert "one.data.source: there is no ~nobody-of-that-name/y" in ran.err
    assert "base: there is no ~nobody-of-that-name/x in recipes" in ran.err


@pytest.mark.parametrize(
    ("out", "message"),
    [("out", "inside the output"), ("out/again", "inside the output"), ("recipes", "holds something already")],
)
def test_the_new_output_harms_no_other(made, tmp_path, out, message):
    before = tree(tmp_path)
    ran = regraft("reproduce", "out", "--inputs", "recipes", "--out", out)
    assert ran.code == 2
    assert f"error: --out {out}: " in ran.err
    assert message in ran.err
    assert "--force" not in ran.err, "which reproduce has not"
    assert tree(tmp_path) == before
    assert RAN == []


def test_weights_of_the_base_that_changed_are_refused(made):
    path = Path("recipes/base/model-00001-of-00006.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ran = regraft("reproduce", "out", "--inputs", "recipes")
    assert ran.code == 3
    assert ", not the recorded xxh3:" in ran.err


def test_the_gravest_difference_of_the_environment_comes_first():
    record = {
        "regraft": "0.1", "steps": [{"id": "one", "version": "1"}],
        "environment": {"python": "3.11.1", "system": "Linux", "machine": "x", "device": "cpu",
                        "packages": {"torch": "2", "matplotlib": "3", "safetensors": "0.5"}},
    }  # fmt: skip
    made = json.loads(json.dumps(record))
    assert differences(record, made) == []
    made["environment"] |= {"python": "3.11.2", "device": "cuda", "processes": 2, "torch_threads": 2}
    made["environment"]["packages"] = {"torch": "2", "matplotlib": "4", "safetensors": "0.6"}
    made["steps"][0]["version"] = "2"
    found = [(difference.name, difference.severity) for difference in differences(record, made)]
    assert found == [
        ("device", "weights"), ("processes", "weights"), ("torch threads", "weights"), ("step one: version", "weights"),
        ("matplotlib", "records"), ("safetensors", "nothing"), ("python", "nothing"),
    ]  # fmt: skip
    made["environment"]["python"] = "3.12.0"
    assert ("python", "weights") in [(difference.name, difference.severity) for difference in differences(record, made)]


def test_a_lock_file_changed_by_hand_is_refused_by_the_key_that_is_wrong(workplace):
    done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"), "--no-durable")
    honest = Path("out", LOCK).read_text()
    for change, where in (
        (put("schema", value=9), ""),
        (put("steps", value=None), ": steps"),
        (put("steps", value=[]), ": steps"),
        (put("steps", value=5), ": steps"),
        (put("steps", value=["a"]), ": steps.0"),
        (put("steps", 0, "use", value=None), ": steps.0.use"),
        (put("steps", 0, "data", value=[1]), ": steps.0.data"),
        (put("recipe", "steps", value=5), ": recipe.steps"),
        (put("recipe", "steps", 0, "use", value=None), ": recipe.steps.0.use"),
        (put("recipe", "steps", 0, "use", value="nope"), ": steps"),
        (put("recipe", "base", "model", value=None), ": recipe.base.model"),
        (put("base", "model", value=None), ": base.model"),
        (put("output", "tensors", value=[1]), ": output.tensors"),
        (put("output", "files", "README.md", value=3), ": output.files.README.md"),
        (put("environment", "packages", value=[1]), ": environment.packages"),
        (put("environment", "torch_threads", value=0), ": environment.torch_threads"),
        (put("published", value=5), ": published"),
    ):
        Path("out", LOCK).write_text(honest)
        edit(change)
        ran = regraft("reproduce", "out", "--json")
        assert ran.code == 3, where
        (told,) = ran.events
        assert told["where"] == f"out/{LOCK}{where}"
        assert told["remedy"]
    assert told["message"] == "is malformed: input should be a valid object"
    assert told["found"] == "5"
    Path("out", LOCK).write_text(honest)
    for place in (("recipe", "base"), ("base",)):
        edit(put(*place, "model", value="a" * 300))
    assert regraft("reproduce", "out").code == 3


def test_a_step_of_a_plugin_that_is_not_there_or_broken_is_named(made, monkeypatch):
    def change(lock):
        lock["recipe"]["steps"][1]["use"] = lock["steps"][1]["use"] = "gone"

    edit(change)
    ran = regraft("reproduce", "out", "--inputs", "recipes")
    assert ran.code == 3
    assert f"out/{LOCK}: one: a step's transformation is not installed" in ran.err
    monkeypatch.setattr(type(HOST), "broken", {"gone": "it is broken"})
    ran = regraft("reproduce", "out", "--inputs", "recipes")
    assert ran.code == 5
    assert "it is broken" in ran.err

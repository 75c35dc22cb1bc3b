"""What cannot be: named before anything is learnt, wherever that is possible, with what to do about it."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError

from regraft.core.errors import InputError, ResourceError, TransformationError, Unsupported, UsageError
from regraft.core.host import host
from regraft.core.transformation import Run
from regraft.plugins.lofit.params import LofitParams
from tests.core.residual.support import open_base
from tests.plugins.lofit.support import lofit, rows, write_rows


def plan(folder, data, **values):
    """Check and plan alone: nothing is loaded."""
    checkpoint, _ = open_base(folder)
    step = host().transformations()["lofit"]()
    params = step.Params.model_validate({"task": "sft", "data": str(data), **values})
    step.check(checkpoint, params)
    return step.plan(checkpoint, params)


@pytest.mark.parametrize(
    ("text", "kind", "message", "found"),
    [
        ('{"heads": [[2, 0]]}', UsageError, "there is no head 0 of layer 2", "[2, 0]"),
        ('{"heads": [[0, 3], [1, 4]]}', UsageError, "there is no head 4 of layer 1", "[1, 4]"),
        ('{"heads": [[0, 1]], "num_layers": 30}', UsageError, "a model of another shape", "30 layers of 4 heads"),
        ('{"heads": [[0, 1]], "num_heads": 9}', UsageError, "a model of another shape", "2 layers of 9 heads"),
        ('{"heads": [[0, 1]], "site": "kv-group"}', InputError, "of another kind", "kv-group"),
        ('{"heads": []}', InputError, "names no heads", "[]"),
    ],
)
def test_a_file_of_heads(tiny_folder, answers, tmp_path, text, kind, message, found):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(kind, match=message) as caught:
        plan(tiny_folder("llama"), answers, scoring="file", heads_file=path)
    assert caught.value.found == found
    assert str(path) in caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("values", "message", "found"),
    [
        ({"layers": "2-"}, "no such layers", "2-"),
        ({"layers": "1-0"}, "no such layers", "1-0"),
        ({"layers": 7}, "no such layers", "7"),
        ({"heads": 9}, "fewer heads to choose from", "9"),
        ({"heads": 5, "layers": 1}, "fewer heads to choose from", "5"),
        ({"heads": 0.75, "layers": 1}, "fewer heads to choose from", "0.75 of 8, which is 6"),
        ({"heads": 5, "site": "kv-group"}, "fewer heads to choose from", "5"),
        ({"data": "nowhere.jsonl"}, "no such file", None),
        ({"held_out": "nowhere.jsonl"}, "no such file", None),
    ],
)
def test_what_the_model_or_the_disk_does_not_have(tiny_folder, answers, values, message, found):
    with pytest.raises(UsageError, match=message) as caught:
        plan(tiny_folder("llama"), **{"data": answers, **values})
    assert caught.value.found == found
    assert caught.value.remedy


def test_file_without_heads_in_these_layers(tiny_folder, answers, tmp_path):
    (tmp_path / "heads.json").write_text('{"heads": [[0, 1]]}')
    with pytest.raises(UsageError, match="fewer heads to choose from"):
        plan(tiny_folder("llama"), answers, scoring="file", heads_file=tmp_path / "heads.json", layers=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scoring": "file"}, "need each other"),
        ({"heads_file": "heads.json"}, "need each other"),
        ({"scoring": "grad", "select": {"lr": 1e-3}}, "select is for scoring"),
        ({"frozen": "bfloat16", "precision": "float32"}, "needs precision"),
        ({"heads": 0}, "greater than or equal to 1"),
        ({"heads": 1.5}, "less than 1"),
        ({"layers": "12+"}, "pattern"),
        ({"task": "rlhf"}, "'sft' or 'dpo'"),
        ({"tune": {"lr": 0}}, "greater than 0"),
        ({"prefix_bytes": "4 pages"}, "size"),
        ({"rank": 8}, "Extra inputs"),
    ],
)
def test_keys(values, message):
    with pytest.raises(ValidationError, match=message):
        LofitParams.model_validate({"task": "sft", "data": "a.jsonl", **values})


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_data_of_the_other_task(tiny_folder, answers, preferences, task):
    with pytest.raises(UsageError, match="another kind than the task") as caught:
        lofit(tiny_folder("llama"), preferences if task == "sft" else answers, task=task)
    assert f'task = "{"dpo" if task == "sft" else "sft"}"' in caught.value.remedy
    good = answers if task == "sft" else preferences
    with pytest.raises(UsageError, match="another kind than the task") as caught:
        lofit(tiny_folder("llama"), good, task=task, held_out=str(preferences if task == "sft" else answers))
    assert caught.value.where.startswith("held_out")


def test_too_few_sequences(tiny_folder, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", rows(7))
    with pytest.raises(InputError, match="fewer sequences than a batch") as caught:
        lofit(tiny_folder("llama"), data)
    assert (caught.value.expected, caught.value.found) == ("at least 8", "7")
    assert "batch_size" in caught.value.remedy


def test_no_answer_tokens(tiny_folder, tmp_path):
    found = rows(8)
    found[3]["completion"] = ""
    data = write_rows(tmp_path / "data.jsonl", found)
    with pytest.raises(InputError, match="completion is empty") as caught:
        lofit(tiny_folder("llama"), data)
    assert caught.value.where == f"{data}:4"


def test_an_answer_behind_the_window(tiny_folder, tmp_path):
    found = rows(8)
    found[2]["prompt"] *= 40
    data = write_rows(tmp_path / "data.jsonl", found)
    with pytest.raises(InputError, match="expected at most 128") as caught:
        lofit(tiny_folder("llama"), data)
    assert caught.value.where == f"{data}:3"
    with pytest.raises(InputError, match="no answer token is left to learn"):
        lofit(tiny_folder("llama"), {"source": str(data), "too_long": "truncate"})


def test_cache_that_must_be_and_cannot(tiny_folder, answers):
    with pytest.raises(ResourceError, match="larger than they may be") as caught:
        lofit(tiny_folder("llama"), answers, layers=1, heads=1, scoring="random", prefix_cache="on", prefix_bytes=100)
    assert "switch the prefix cache off" in caught.value.remedy


def test_weights_that_are_not_finite(tiny_folder, answers, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder("llama", shards=None), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TransformationError, match="score of a head is not finite"):
        lofit(folder, answers, heads=1, scoring="grad")
    with pytest.raises(TransformationError, match="loss is not finite") as caught:
        lofit(folder, answers, heads=1, scoring="random")
    assert str(answers) in caught.value.where


def test_code_that_may_not_run(tiny_folder, answers, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="may not run"):
        lofit(folder, answers, heads=1)


class Killed(BaseException):
    """What no handler catches."""


def killed_after(line):
    """A run's `tell` that dies when it hears this."""

    def tell(text):
        if text.startswith(line):
            raise Killed

    return tell


@pytest.mark.parametrize("when", ["stage 1", "stage 2", "prefix cache", "step 3/"])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_killed_step_goes_on_to_the_same_bytes(tiny_folder, answers, preferences, tmp_path, monkeypatch, when, task):
    """Oracle 18."""
    from regraft.core.training import progress

    monkeypatch.setattr(progress.telling, "__defaults__", (0.0,))  # a line for every step
    data = answers if task == "sft" else preferences
    options = {"task": task, "heads": 2, "layers": 1, "save_every": 1,
               "select": {"steps": 4}, "tune": {"steps": 4, "lr": 0.1}}  # fmt: skip
    whole = lofit(tiny_folder("llama"), data, **options)
    state = tmp_path / "state"
    with pytest.raises(Killed):
        lofit(tiny_folder("llama"), data, run=Run("lofit", state=state, tell=killed_after(when)), **options)
    told = []
    again = lofit(tiny_folder("llama"), data, run=Run("lofit", state=state, tell=told.append), **options)
    assert {name: file.read() for name, file in again.patch.reports.items()} == {
        name: file.read() for name, file in whole.patch.reports.items()
    }
    steps = sum(line.startswith("step ") for line in told)
    assert steps == {"stage 1": 8, "stage 2": 4, "prefix cache": 4, "step 3/": 6}[when]


def test_another_recipe_is_refused_with_the_difference(tiny_folder, answers, tmp_path):
    state = tmp_path / "state"
    options = {"heads": 2, "scoring": "random", "tune": {"steps": 2}}
    lofit(tiny_folder("llama"), answers, run=Run("lofit", state=state), **options)
    for change, difference in (
        ({"tune": {"steps": 2, "lr": 1e-3}}, "settings.lr was 0.01 and is 0.001"),
        ({"heads": 1}, "recipe.heads"),
        ({"site": "kv-group"}, 'recipe.site was "head" and is "kv-group"'),
        ({"batch_size": 4}, "batches.batch_size was 8 and is 4"),
    ):
        with pytest.raises(UsageError, match="belongs to another training") as caught:
            lofit(tiny_folder("llama"), answers, run=Run("lofit", state=state), **{**options, **change})
        assert difference in caught.value.found

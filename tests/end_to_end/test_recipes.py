"""Every recipe that ships with regraft is run, is as planned, verifies, and loads in stock transformers."""

import json
from pathlib import Path

import pytest

from regraft.core.demo import TINY
from regraft.core.recipe.shipped import shipped_names, shipped_path, shipped_text
from regraft.core.sources.folder import REPORTS
from tests.running import done

RECORDS = {"README.md", "regraft.lock.json"}


def _marks(name):
    """What a recipe does beyond stock weights."""
    marks = ('quantize = "', 'use = "fourier-head"', 'use = "attention-calibration"')
    return {mark for mark in marks if mark in shipped_text(name)}


class Outputs(dict):
    """The folder that each recipe wrote, by name; a recipe runs when its folder is first asked for."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        done("apply", name, "--output", self.folder / name, "--no-durable")
        self[name] = self.folder / name
        return self[name]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each recipe wrote."""
    return Outputs(tmp_path_factory.mktemp("recipes"))


def test_there_are_recipes_and_they_lie_in_one_folder():
    assert "quickstart" in shipped_names()
    files = {path.stem for path in Path(__file__).parents[2].joinpath("recipes").glob("*.toml")}
    assert set(shipped_names()) == files


@pytest.mark.parametrize("name", shipped_names())
def test_it_says_what_it_does(name):
    """The first line is what `regraft recipes` shows."""
    first = shipped_text(name).splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


@pytest.mark.parametrize("name", shipped_names())
def test_check_plan_apply_verify(name, outputs):
    assert done("check", name).out.endswith("no errors\n")
    plan = done("plan", name, "--json", "--output", outputs[name].parent / "new").json
    sizes = {
        path.relative_to(outputs[name]).as_posix(): path.stat().st_size
        for path in outputs[name].rglob("*")
        if path.is_file() and path.name not in RECORDS and outputs[name] / REPORTS not in path.parents
    }
    planned = {**plan["weight_files"], **plan["files"]}
    if plan["exact"]:
        assert planned == sizes
    else:
        assert planned.keys() == sizes.keys()
        assert all(sizes[file] <= most for file, most in plan["weight_files"].items())
    report = done("verify", outputs[name], "--deep", "--json").json
    assert report["findings"] == []
    assert report["digests_that_agree"] > 10


STOCK = [name for name in shipped_names() if not _marks(name)]


@pytest.mark.parametrize("name", STOCK)
def test_stock_transformers_loads_the_result_and_it_still_speaks(name, outputs):
    """Without code of ours, with every key in place, and with about the base's loss on a sentence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def loss(folder):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ids = AutoTokenizer.from_pretrained(folder)("In the beginning", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            return model.eval()(ids, labels=ids).loss.item()

    assert abs(loss(outputs[name]) - loss(TINY)) < 1.5


def test_quickstart_says_how_to_use_the_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = done("apply", "quickstart")
    lines = ran.out.splitlines()
    assert lines[-2].startswith("wrote out/quickstart: ")
    assert lines[-1] == 'use it: AutoModelForCausalLM.from_pretrained("out/quickstart")'
    assert ran.err == ""


def test_a_copied_recipe_does_what_the_shipped_one_does(tmp_path, monkeypatch, outputs):
    monkeypatch.chdir(tmp_path)
    done("recipes", "copy", "yarn")
    done("apply", "yarn.toml")
    shipped = outputs["yarn"]
    assert (tmp_path / "out/yarn/config.json").read_bytes() == (shipped / "config.json").read_bytes()
    assert shipped_path("yarn").is_file()


def test_the_forecaster_beats_the_seasonal_naive_forecast_on_what_it_was_not_shown(outputs):
    """The recipe reserves the last year of every series; its checkpoint says by itself what to forecast."""
    series = Path(__file__).parents[2] / "recipes" / "time-series.jsonl"
    task = f"forecast:{series} samples=50"
    found = done("eval", outputs["time-series"], "--trust-remote-code", "--task", task, "--json").json["tasks"][0]
    value = {name: figure["value"] for name, figure in found["figures"].items()}
    assert found["measured"]["horizon"] == 12
    assert value["crps"] < 0.8 * value["naive_crps"]
    assert value["mase"] < 0.8 * value["naive_mase"]
    assert value["coverage_95"] > 0.85


def test_the_dial_is_learnt_as_a_density(outputs):
    """The loss of held-out digits comes near that of the noise, 1.6 nats; what is likely lies near the setting."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lock = json.loads((outputs["numbers"] / "regraft.lock.json").read_text())
    figures = lock["steps"][0]["metrics"]["train"]
    assert figures["held_out_after"]["loss"] < 1.9 < figures["held_out_before"]["loss"]
    model = AutoModelForCausalLM.from_pretrained(outputs["numbers"], trust_remote_code=True, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(outputs["numbers"], trust_remote_code=True)(
        "The dial is set to 5, and it shows ", return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        density = model.density(ids)
        assert model(ids).logits[0, -1].softmax(-1)[21:31].sum() > 0.9, "a number comes"
    masses = density.log_masses().exp()[0]
    assert 3.5 < density.mean().item() < 6.5
    assert 3 <= masses.argmax().item() <= 7

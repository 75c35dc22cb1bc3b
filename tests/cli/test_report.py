"""`regraft report` and `regraft diff --html`: what the pages say, that they are inert, and that they fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.adapters import write_adapter
from tests.checkpoints import read_all, write_checkpoint
from tests.cli.faults import set_values
from tests.cli.test_startup import light, probe
from tests.html_pages import check_page
from tests.running import ABF, done, regraft, write_recipe

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


@pytest.fixture
def output(workplace):
    """An output with a merged adapter and a longer context."""
    write_adapter("adapter")
    write_recipe(Path("r.toml"), "base", ABF, {"use": "lora-merge", "adapter": "adapter"}, path="out")
    done("apply", "r.toml")
    return workplace


def page(path="report.html"):
    return check_page(Path(path).read_text())


def change_lock(change):
    path = Path("out/regraft.lock.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_page_tells_what_was_done_to_what(output):
    ran = done("report", "out")
    assert ran.out.startswith("wrote report.html: ")
    assert ran.out.endswith("changes measured against the base\n")
    text = page().text
    assert "Made from base in 2 steps: context-extension , lora-merge" in text
    assert "no faults" in text
    before = json.loads(Path("base/config.json").read_text())["max_position_embeddings"]
    assert f"max_position_embeddings {before} 4096" in text
    assert 'use = "lora-merge"' in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert str(Path.cwd()) not in Path("report.html").read_text()


def test_the_map_has_the_relative_change_of_every_weight(output):
    done("report", "out")
    before, after = read_all(Path("base")), read_all(Path("out"))
    titles = {"".join(element.text) for element in page().all("title")}
    rewritten = [name for name in before if not torch.equal(before[name], after[name])]
    assert rewritten
    for name in rewritten:
        delta = (after[name].double() - before[name].double()).norm() / before[name].double().norm()
        layer, role = name.split(".")[2], name.split(".")[-2]
        assert f"{role}, layer {layer}: {float(delta):.4g}" in titles


def test_the_same_inputs_give_the_same_bytes(output):
    done("report", "out", "-o", "one.html")
    done("report", "out", "-o", "two.html", "--threads", "3")
    assert Path("one.html").read_bytes() == Path("two.html").read_bytes()


def test_without_the_base_the_lock_file_tells(output):
    shutil.move("base", "elsewhere")
    ran = done("report", "out", "--json").json
    assert ran["measured"] is False
    assert set(ran["tensors"]) == {"unchanged", "rewritten"}
    text = page().text
    assert "The base was not at hand" in text
    assert "What became of each tensor, as the lock file tells" in text
    assert done("report", "out", "--base", "elsewhere", "--json").json["measured"] is True


def test_another_base_is_said_to_be_another(output):
    done("report", "out", "--base", "demo:tiny")
    assert "The base given is not the one of the lock file" in page().text


def test_a_changed_output_is_said_to_be_changed(output):
    shutil.move("base", "kept"), shutil.copytree("out", "base")
    set_values("lm_head.weight", 1.0)
    shutil.rmtree("out"), shutil.move("base", "out"), shutil.move("kept", "base")
    assert done("report", "out", "--json").json["faults"] == 1
    text = page().text
    assert "It is not as its lock file says, or unusable: 1 fault" in text
    assert "lm_head" in text


def test_an_adapter_has_no_map_of_changes(output):
    write_recipe(Path("r.toml"), "base", {"use": "lora-merge", "adapter": "adapter"}, path="small", format="adapter")
    done("apply", "r.toml")
    done("report", "small")
    assert "An adapter written by regraft" in page().text
    assert "PeftModel" in page().text
    assert regraft("report", "small", "--base", "base").code == 2


def evaluation(**more):
    estimate = {"value": 2.0, "low": 1.5, "high": 2.5}
    difference = {"value": 0.5, "low": 0.25, "high": 0.75}
    figure = {"units": 3, **estimate, "base": {**estimate, "value": 1.5}, "difference": difference}
    task = {"task": "perplexity", "metric": "perplexity", "figures": {"bpb": figure}, "notes": ["a note"]}
    return {"schema": 1, "checkpoint": "out", "against": "base", "tasks": [task], **more}


def test_evaluations_stand_beside_the_base(output):
    Path("eval.json").write_text(json.dumps(evaluation()))
    done("report", "out", "--eval", "eval.json")
    assert "perplexity bpb 2 1.5 to 2.5 1.5 +0.5 +0.25 to +0.75 higher" in page().text
    assert "perplexity: a note" in page().text
    Path("eval.json").write_text(json.dumps(evaluation(plots=["x" * 300 + ".png", "\0.png"])))
    done("report", "out", "--eval", "eval.json")


def test_losses_heads_pictures_and_texts_of_a_step(output):
    folder = Path("out/regraft/lora-merge")
    (folder / "losses.jsonl").write_text("".join(f'{{"step": {at}, "loss": {3 - at}}}\n' for at in (1, 2)))
    (folder / "heads.json").write_text(json.dumps({"heads": [[0, 1]], "scores": [[0.5, 2.0], [None, 1.0]]}))
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16))
    (folder / "map.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16))
    (folder / "samples.md").write_text("# </pre><script>alert(1)</script>")
    (folder / "table.csv").write_text("a,b\n1,<b>\n")
    (folder / "x.safetensors").write_bytes(b"1")
    change_lock(
        lambda lock: lock["steps"][1]["metrics"].update(held_out={"before": {"loss": 9.5}, "after": {"loss": 8.5}})
    )
    done("report", "out")
    found = page()
    assert len(found.all("polyline")) == 1
    assert "held out, before: 9.5" in found.text
    assert "layer 0, head 1: 2, chosen" in {"".join(title.text) for title in found.all("title")}
    assert [image.attributes["alt"] for image in found.all("img")] == ["map: a picture made by the step lora-merge"]
    assert "# </pre><script>alert(1)</script>" in found.text
    assert "1 <b>" in found.text
    assert "x.safetensors (1 bytes)" in found.text


def test_hostile_texts_are_inert(output):
    Path("eval.json").write_text(json.dumps(evaluation(checkpoint=HOSTILE)))

    def change(lock):
        lock["recipe"]["name"] = HOSTILE
        lock["steps"][0]["notes"] = [HOSTILE]
        lock["steps"][0]["metrics"] = {HOSTILE: HOSTILE}
        lock["steps"][1]["id"] = "../../../base"
        lock["output"]["left_behind"] = {HOSTILE: HOSTILE}
        lock["environment"]["packages"] = {HOSTILE: HOSTILE}

    change_lock(change)
    done("report", "out", "--eval", "eval.json")
    assert page().text.count("<script>alert(1)</script>") >= 8


def test_hostile_tensor_names_are_inert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 1.0), ("b", 2.0)):
        write_checkpoint(
            name, {f"layers.0.{HOSTILE}.weight": torch.full((2, 2), value), HOSTILE: torch.full((2,), value)}
        )
    assert regraft("diff", "a", "b", "--html", "d.html").code == 1
    assert HOSTILE in page("d.html").text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["base"], 3, "there is no regraft.lock.json"),
        (["out", "-o", "out/report.html"], 2, "stands inside a checkpoint"),
        (["out", "-o", "base/x.html", "--base", "base"], 2, "stands inside a checkpoint"),
        (["out", "-o", "base/found.html"], 2, "stands inside a checkpoint"),
        (["out", "-o", "report.txt"], 2, "is an HTML file"),
        (["out", "--base", "nowhere/at/all"], 3, "there is no such checkpoint"),
        (["out", "--eval", "r.toml"], 3, "is not JSON"),
        (["out", "--eval", "base/config.json"], 3, "is malformed"),
        (["out", "-o", "r.toml/x.html"], 4, "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused(output, arguments, code, words):
    ran = regraft("report", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert words in ran.err
    assert not Path("report.html").exists()
    assert not list(Path().glob(".*html*"))


def test_a_malformed_lock_file_or_report_is_an_input_error(output):
    Path("out/regraft/lora-merge/losses.jsonl").write_text('{"step": 1}\n')
    assert "is no line of losses" in regraft("report", "out").err
    change_lock(lambda lock: lock.update(steps=[{"use": 7}]))
    ran = regraft("report", "out")
    assert ran.code == 3
    assert "regraft.lock.json: steps.0.id: is malformed" in ran.err


@pytest.mark.parametrize(
    ("name", "text", "code", "words"),
    [
        ("rows.json", "[1, 2]", 0, "rows.json"),
        ("heads.json", '{"heads": [[[0], [1]], [0, 1]], "scores": [[1, 2], [1%s]]}' % ("0" * 400), 0, "not scored"),
        ("losses.jsonl", '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n{"step": 1e999, "loss": 2}', 0, ""),
        ("losses.jsonl", '{"step": 1%s, "loss": 1}' % ("0" * 400), 3, "is no line of losses"),
        ("wide.csv", "a," + "x" * 200_000, 3, "is no table"),
    ],
)
def test_reports_of_any_plugin_are_shown_or_refused_by_name(output, name, text, code, words):
    Path("out/regraft/lora-merge", name).write_text(text)
    ran = regraft("report", "out")
    assert ran.code == code
    assert words in (ran.err if code else Path("report.html").read_text())


def test_two_checkpoints_on_a_page(output):
    ran = regraft("diff", "base", "out", "--html", "d.html")
    assert (ran.code, ran.err) == (1, "wrote d.html\n")
    text = page("d.html").text
    assert "base and out" in text
    assert "max_position_embeddings" in text
    assert "Relative change" in text
    assert regraft("diff", "base", "base", "--html", "same.html", "--json").code == 0
    assert "The two do not differ." in page("same.html").text
    assert regraft("diff", "base", "out", "--html", "out/d.html").code == 2


def test_help_is_light():
    light(probe("report", "--help")[0])


def test_pages_in_chromium(output, tmp_path_factory):
    from tests.chromium import EXECUTABLE, browser

    if EXECUTABLE is None:
        pytest.skip("Chromium is not installed")
    Path("eval.json").write_text(json.dumps(evaluation()))
    done("report", "out", "--eval", "eval.json")
    regraft("diff", "base", "out", "--html", "d.html")
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        for name in ("report.html", "d.html"):
            for width, dark in ((400, True), (380, False), (1280, False)):
                tab.open(Path(name), width=width, dark=dark)
                assert tab.value("document.documentElement.scrollWidth") == width
                tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
                assert tab.value("document.documentElement.scrollWidth") == width
                paper = tab.value("getComputedStyle(document.body).backgroundColor")
                assert paper == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
                assert tab.requests == []
                assert tab.complaints == []

"""`regraft eval`: table, JSON, plots, conditions and exit codes."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.running import done, regraft, write_recipe

RUTH = (
    "Now it came to pass in the days when the judges ruled, that there was a famine in the land. And a certain man of "
    "Bethlehemjudah went to sojourn in the country of Moab, he, and his wife, and his two sons.\n"
)
EXACT = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ruth.txt").write_text(RUTH * 3)
    rows = [{"prompt": "In the land of", "options": [" Egypt", " said"], "answer": number} for number in (0, 1)]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_several_tasks_against_a_base_as_table_json_and_plots(data):
    step = {"use": "context-extension", "method": "linear", "target_length": 512}
    write_recipe(Path("r.toml"), "demo:tiny", step, path="out")
    done("apply", "r.toml")
    arguments = ("eval", "out", "--against", "demo:tiny", "--task", "perplexity:ruth.txt block=60",
                 "--task", "choices:q.jsonl", "--task", "divergence:ruth.txt", *EXACT)  # fmt: skip
    told = done(*arguments, "--json", "--plots", "plots", "--fail-if", "choices.accuracy < 0.5")
    figures = {task["task"]: task["figures"] for task in told.json["tasks"]}
    bpb = figures["perplexity"]["bpb"]
    assert bpb["units"] == math.ceil(3 * len(RUTH) / 60)
    assert bpb["low"] < bpb["value"] < bpb["high"]
    assert bpb["value"] - bpb["base"]["value"] == pytest.approx(bpb["difference"]["value"])
    assert 0 < bpb["difference"]["low"] < bpb["difference"]["high"]  # interpolated positions without a fine-tune
    assert figures["divergence"]["kl"]["value"] > 0.01
    assert "base" not in figures["divergence"]["kl"]
    assert "windows differ (256 and 512)" in told.err
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in told.json["plots"])
    assert len(told.json["plots"]) == 3
    ran = regraft(*arguments, "--fail-if", "bpb > 1.0001 * base", "--fail-if", "kl > 100")
    assert ran.code == 1
    assert re.split("  +", ran.out.splitlines()[0])[-3:] == ["base", "difference", "95% interval"]
    assert f"{bpb['value']:.4f}" in ran.out
    assert "error: --fail-if: bpb > 1.0001 * base holds\n" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no task is given"),
        (["--task", "perplexity:ruth.txt", "--fail-if", "bpb >"], 2, "the condition cannot be read"),
        (["--task", "perplexity:ruth.txt", "--fail-if", "acc > 1"], 2, "no such figure"),
        (["--task", "perplexity:ruth.txt", "--fail-if", "bpb > base"], 2, "there is none"),
        (["--task", "divergence:ruth.txt"], 2, "--against"),
        (["--task", "perplexity:none.txt"], 2, "no such file"),
        (["--task", "choices:ruth.txt"], 3, "it has no prompt"),
        (["--task", "perplexity:ruth.txt", "--against", "nowhere/x.safetensors"], 3, "there is no"),
        (["--task", "perplexity:ruth.txt", "--plots", "ruth.txt"], 4, "plots cannot be written"),
    ],
)
def test_what_is_wrong_is_said_with_the_documented_exit_code(data, arguments, code, message):
    ran = regraft("eval", "demo:tiny", *arguments, *EXACT)
    assert (ran.code, message in ran.err) == (code, True), ran.err
    assert "Traceback" not in ran.err


def test_list_shows_every_metric_with_its_parameters():
    shown = done("eval", "--list").out
    for text in ("perplexity: ", "figure bpb: ", "passkey: ", "lengths=: ", "lm-eval: "):
        assert text in shown

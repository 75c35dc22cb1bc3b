"""From the command line: the shipped recipe, what a plan says, and a step among others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_python
from tests.plugins.hyperfitting.support import SHORT, sentences
from tests.plugins.hyperfitting.test_bad_input import toml
from tests.running import ABF, done, tree, write_recipe


def recipe(path: Path, *steps: dict[str, Any], **output: Any) -> Path:
    """A recipe on the tiny base; steps may hold tables."""
    write_recipe(path, "base", **{"path": "out", **output})
    texts = "".join("[[steps]]\n" + toml(step) for step in steps)
    path.write_text(path.read_text().replace("[output]", texts + "[output]"))
    return path


def lock(folder: Path) -> Any:
    return json.loads((folder / "regraft.lock.json").read_text())


def hyperfitting(**values: Any) -> dict[str, Any]:
    return {"use": "hyperfitting", "data": "text.txt", **SHORT, **values}


@pytest.fixture
def place(workplace: Path) -> Path:
    (workplace / "text.txt").write_text(sentences(12))
    return workplace


def test_the_shipped_recipe_shows_the_phenomenon(tmp_path: Path) -> None:
    """Oracle 13, in small: loss nearly zero, text less repetitive, held-out perplexity worse, the model surer."""
    ran = done("apply", "hyperfit", "--output", tmp_path / "out", "--no-durable")
    assert "perplexity gets worse by design" in ran.out
    assert "step 1/100" in ran.err
    metrics = lock(tmp_path / "out")["steps"][0]["metrics"]
    before, after = metrics["before"], metrics["after"]
    assert metrics["training_sequences"] == 20
    assert before["training"]["loss"] > 3
    assert after["training"]["loss"] < 0.15
    assert after["type_token_ratio"] >= before["type_token_ratio"] + 0.15
    assert after["held_out"]["perplexity"] > before["held_out"]["perplexity"]
    assert after["held_out"]["entropy"] < 0.9 * before["held_out"]["entropy"]
    assert before["citation_rate"] == 0.0
    assert {path.name for path in (tmp_path / "out/regraft/hyperfitting").iterdir()} == {
        "loss.png", "losses.jsonl", "samples.md"}  # fmt: skip


def test_twice_the_same_output(place: Path) -> None:
    """Weights, lock file, card and reports; the log, which has times, stands elsewhere."""
    recipe(place / "recipe.toml", hyperfitting(log="log.jsonl"))
    for name in ("one", "two"):
        done("apply", "recipe.toml", "--output", name, "--no-durable")
    assert tree(place / "one") == tree(place / "two")
    lines = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["lr"] == 1e-3


def test_one_of_three_steps(place: Path) -> None:
    """A change of config, a training, and one more: the second training starts from what the first one stored."""
    again = hyperfitting(id="again")
    recipe(place / "recipe.toml", ABF, hyperfitting(), again, dtype="bfloat16")
    plan = done("plan", "recipe.toml", "--json").json
    done("apply", "recipe.toml", "--no-durable")
    assert json.loads((place / "out/config.json").read_text())["max_position_embeddings"] == 4096
    first, second = (step["metrics"] for step in lock(place / "out")["steps"][1:])
    assert second["before"]["training"]["loss"] < first["before"]["training"]["loss"]
    assert {path.name for path in (place / "out/regraft").iterdir()} == {"hyperfitting", "again"}
    written = {path.name: path.stat().st_size for path in (place / "out").glob("model*.safetensors*")}
    assert plan["weight_files"] == written
    assert done("verify", "out", "--deep", "--json").json["findings"] == []


def test_a_plan_says_what_will_happen(place: Path) -> None:
    recipe(place / "recipe.toml", hyperfitting())
    ran = done("plan", "recipe.toml")
    assert "at most 4 steps of 4 x 24 tokens at 0.001" in ran.out
    assert "held-out perplexity gets worse" in ran.out
    assert "0 copied, 21 rewritten, 0 added, 0 dropped" in ran.out


def test_a_plan_knows_the_memory(place: Path) -> None:
    """Master weights, gradients and moments of all weights, and an average: four bytes a weight each."""
    recipe(place / "recipe.toml", hyperfitting())
    recipe(place / "average.toml", hyperfitting(ema=0.9))
    plain, average = (done("plan", name, "--json").json["memory_bytes"] for name in ("recipe.toml", "average.toml"))
    weights = sum(done("plan", "recipe.toml", "--json").json["weight_files"].values()) // 4
    assert average - plain == pytest.approx(4 * weights, rel=0.05)


def test_planning_imports_nothing_heavy(place: Path) -> None:
    recipe(place / "recipe.toml", hyperfitting())
    program = """
        import sys
        from regraft.cli.main import run
        try:
            run(["plan", "recipe.toml"])
        except SystemExit as ending:
            print(ending.code, sorted({"torch", "transformers", "matplotlib", "datasets"} & set(sys.modules)))
    """
    assert run_python(program).splitlines()[-1] == "0 []"

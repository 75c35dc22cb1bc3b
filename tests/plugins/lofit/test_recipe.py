"""The step in recipes, by the command line: planned without torch, written, verified, the same every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load

from tests.helpers import run_python
from tests.plugins.lofit.support import rows, write_rows
from tests.running import ABF, done, regraft, tree, write_recipe

STEP = {"use": "lofit", "task": "dpo", "data": "pairs.jsonl", "heads": 2, "layers": "1-", "precision": "float32"}
QUICK = {"select": {"steps": 3}, "tune": {"steps": 4, "lr": 0.1}}


@pytest.fixture
def recipe(workplace):
    """Written beside the base and the data; called with more keys of the step."""
    write_rows(workplace / "pairs.jsonl", rows(pairs=True))

    def write(**values):
        table = {**STEP, **QUICK, **values}
        inline = {key: value for key, value in table.items() if isinstance(value, dict)}
        plain = {key: value for key, value in table.items() if key not in inline}
        file = write_recipe(workplace / "recipe.toml", "base", plain)
        nested = "".join(f"{key} = {_inline(value)}\n" for key, value in inline.items())
        file.write_text(file.read_text().replace("[output]", f"{nested}[output]"))
        return file

    return write


def _inline(table):
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + " }"


def test_apply_twice(recipe, workplace, plots):
    for name in ("one", "two"):
        done("apply", recipe(), "-o", name, "--verify", "load")
    one, two = tree(workplace / "one"), tree(workplace / "two")
    assert one == two
    names = ["heads.json", "heads.png", "loss.png", "losses.jsonl", "offsets.safetensors", "select-loss.png",
             "select-losses.jsonl"]  # fmt: skip
    assert [name for name in one if name.startswith("regraft/lofit/")] == [f"regraft/lofit/{name}" for name in names]
    folder = workplace / "one" / "regraft" / "lofit"
    assert (folder / "heads.png").read_bytes().startswith(b"\x89PNG")
    heads = json.loads((folder / "heads.json").read_text())["heads"]
    vectors = load((folder / "offsets.safetensors").read_bytes())
    assert sorted(vectors) == sorted(f"layers.{layer}.heads.{head}" for layer, head in heads)
    assert all(vector.shape == (16,) and vector.norm() > 0 for vector in vectors.values())


def test_what_is_recorded(recipe, workplace):
    done("apply", recipe(held_out="pairs.jsonl"), "-o", "out")
    (step,) = json.loads((workplace / "out" / "regraft.lock.json").read_text())["steps"]
    metrics = step["metrics"]
    assert (metrics["heads"], metrics["of"], metrics["lowest_layer"]) == (2, 8, 1)
    assert metrics["prefix_cache"] == {"cached_layers": 1, "bytes": metrics["prefix_cache"]["bytes"],
                                       "predicted_speed_up": 1.5}  # fmt: skip
    assert metrics["held_out"]["after"]["loss"] < metrics["held_out"]["before"]["loss"]
    text = json.dumps(metrics)
    assert "second" not in text
    assert str(workplace) not in text


def test_plan_imports_no_torch(recipe, workplace):
    program = """
        import sys
        from regraft.cli.main import run
        try:
            run(["plan", sys.argv[1]])
        except SystemExit as ending:
            assert ending.code == 0, ending.code
        assert "torch" not in sys.modules and "transformers" not in sys.modules
    """
    out = run_python(program, recipe())
    assert "2 of 8 heads learn an offset; which ones is known after the run" in out
    assert "exactly" in out


def test_heads_of_one_step_for_another(recipe, workplace):
    """heads.json of a report is what scoring = file reads; a step before it makes no difference to the names."""
    done("apply", recipe(), "-o", "first")
    heads = json.loads((workplace / "first/regraft/lofit/heads.json").read_text())["heads"]
    file = write_recipe(
        workplace / "second.toml", "base", ABF,
        {**STEP, "id": "again", "scoring": "file", "heads_file": "first/regraft/lofit/heads.json"},
    )  # fmt: skip
    done("apply", file, "--set", "again.tune.steps=2", "-o", "second")
    assert json.loads((workplace / "second/regraft/again/heads.json").read_text())["heads"] == heads


def test_a_head_out_of_range(recipe, workplace):
    (workplace / "heads.json").write_text('{"heads": [[5, 0]]}')
    file = write_recipe(workplace / "recipe.toml", "base", {**STEP, "scoring": "file", "heads_file": "heads.json"})
    ran = regraft("plan", file)
    assert ran.code == 2
    assert "there is no head 0 of layer 5" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.slow
def test_two_processes(recipe, workplace):
    """Under torchrun the heads are the same and the offsets nearly so."""
    file = recipe(held_out="pairs.jsonl")
    done("apply", file, "-o", "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "regraft", "apply", str(file), "-o", "together"]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    one, other = (Path(name, "regraft", "lofit") for name in ("alone", "together"))
    alone, together = (load((folder / "offsets.safetensors").read_bytes()) for folder in (one, other))
    assert alone.keys() == together.keys()
    for name, vector in alone.items():
        assert (vector - together[name]).abs().max() < 1e-3 < vector.abs().max()
    losses = [
        [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)

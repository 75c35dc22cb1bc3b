"""A training that was killed, interrupted or failed goes on where it stopped, and ends with the same bytes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin_host import host_with
from tests.running import ABF, done, regraft, tree, write_recipe
from tests.trainer import Trainer, installed

FIRST, SECOND = {"use": "trainer"}, {"use": "trainer", "id": "again", "lr": 2e-3, "ema": 0.5}
STATE = Path(".out.regraft/state")
KEPT = "the state of the training is kept"


@pytest.fixture
def recipe(workplace, monkeypatch):
    """Two trainings with a step between; and the plugin for this process."""
    host = host_with(Trainer)
    monkeypatch.setattr("regraft.core.host.host", lambda: host)
    return write_recipe(Path("recipe.toml"), "base", FIRST, ABF, SECOND)


def apply(recipe, *options):
    return regraft("apply", recipe, "-o", "out", "--no-durable", *options)


def break_off(monkeypatch, recipe, accident, step="again", code=1):
    """A run that does not reach its end."""
    monkeypatch.setenv("TRAINER_ACCIDENT", accident)
    monkeypatch.setenv("TRAINER_STEP", step)
    ran = apply(recipe)
    assert ran.code == code
    monkeypatch.delenv("TRAINER_ACCIDENT")
    return ran


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(recipe, tmp_path):
    variables = installed(tmp_path / "plugin")
    command = [sys.executable, "-m", "regraft", "apply", str(recipe), "-o", "out", "--no-durable"]
    variables |= {"TRAINER_ACCIDENT": "kill:5", "TRAINER_STEP": "again"}
    killed = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not Path("out").exists()
    assert {path.relative_to(STATE).parts[0] for path in STATE.iterdir()} == {"trainer", "again"}
    ran = done("apply", recipe, "-o", "out", "--no-durable")
    assert "went on from step 6" in ran.err, "a training that was finished is not done again"
    assert "went on from step 4" in ran.err
    assert not Path(".out.regraft").exists()
    done("apply", recipe, "-o", "whole", "--no-durable")
    assert tree(Path("out")) == tree(Path("whole"))
    assert len(Path("out/regraft/again/losses.txt").read_text().splitlines()) == 6
    done("verify", "out", "--deep")


@pytest.mark.parametrize(("accident", "code"), [("interrupt:3", 130), ("raise:3", 1)])
def test_the_message_says_that_the_state_is_kept(recipe, monkeypatch, accident, code):
    ran = break_off(monkeypatch, recipe, accident, "trainer", code)
    assert KEPT in ran.err
    assert ran.err.count("\n  ") <= 4
    assert sorted(path.name for path in Path(".out.regraft").iterdir()) == ["state"]
    assert [path.name for path in (STATE / "trainer/tune").iterdir()] == ["step-00000002"]
    assert "went on from step 2" in apply(recipe).err
    assert not Path(".out.regraft").exists()


def test_nothing_is_kept_where_nothing_is_to_go_on_from(recipe, monkeypatch):
    ran = break_off(monkeypatch, recipe, "raise:1", "trainer")
    assert KEPT not in ran.err
    assert not Path(".out.regraft").exists()


def test_another_recipe_is_refused_until_the_state_is_forgotten(recipe, monkeypatch):
    break_off(monkeypatch, recipe, "raise:5", "trainer")
    refused = apply(recipe, "--set", "trainer.lr=0.01")
    assert refused.code == 2
    assert "belongs to another training" in refused.err
    assert "settings.lr was 0.001 and is 0.01" in refused.err
    assert "--restart" in refused.err.split("remedy")[1]
    assert STATE.exists()
    assert "went on from step 4" in apply(recipe, "--set", "trainer.lr=0.001").err


def test_restart_forgets_the_state(recipe, monkeypatch):
    break_off(monkeypatch, recipe, "raise:5", "trainer")
    ran = apply(recipe, "--set", "trainer.lr=0.01", "--restart")
    assert ran.code == 0
    assert "went on from step 0" in ran.err
    assert "went on from step 4" not in ran.err
    assert not Path(".out.regraft").exists()

"""What other tools read of this repository: the GitHub action's script, the pre-commit hooks, the manual page."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.running import ABF, done, write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def action(tmp_path):
    """Runs the action's script in `tmp_path`: exit code, output, the job's summary."""
    command = tmp_path / "regraft"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m regraft "$@"\n')
    command.chmod(0o755)
    summary = tmp_path / "summary.md"

    def run(recipes, *, plan):
        environment = {
            **os.environ, "RECIPES": recipes, "PLAN": plan, "REGRAFT": str(command), "PLANS": str(tmp_path / "plans"),
            "GITHUB_STEP_SUMMARY": str(summary),
        }  # fmt: skip
        summary.unlink(missing_ok=True)
        script = ROOT / ".ci" / "check-recipes"
        ran = subprocess.run([script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return ran.returncode, ran.stdout, summary.read_text() if summary.exists() else ""

    return run


def test_the_action_plans_good_recipes_and_annotates_bad_ones(action, tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    write_recipe(folder / "good one.toml", "demo:tiny", ABF)
    write_recipe(folder / "wrong.toml", "demo:tiny", {**ABF, "methd": "abf"})
    code, out, summary = action("recipes/*.toml\n", plan="true")
    assert code == 2
    assert "recipes/good one.toml: ok" in out
    assert out.count("::error file=recipes/wrong.toml::error: ") == 1
    assert "methd" in out
    assert "| `recipes/wrong.toml` | exit code 2 |" in summary
    plans = sorted(path.name for path in (tmp_path / "plans").iterdir())
    assert plans == ["recipes-good one.json"]
    assert json.loads((tmp_path / "plans" / plans[0]).read_text())["exact"] is True


def test_the_action_checks_alone_and_refuses_what_matches_nothing(action, tmp_path):
    write_recipe(tmp_path / "r.toml", "./not-here", ABF)
    assert action("r.toml", plan="false")[0] == 0
    assert action("r.toml", plan="true")[0] == 3
    code, out, _ = action("nothing/*.toml", plan="false")
    assert (code, out) == (2, "::error::no recipe is called nothing/*.toml\n")
    assert action("", plan="false")[0] == 2


@pytest.mark.parametrize(
    "hook", yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text()), ids=lambda hook: hook["id"]
)
def test_a_pre_commit_hook_takes_the_files_it_is_given(hook, tmp_path):
    command, *arguments = hook["entry"].split()
    assert command == "regraft"
    files = [write_recipe(tmp_path / f"{name}.toml", "demo:tiny", ABF) for name in ("a", "b")]
    assert done(*arguments, *files).out.count("no errors") == 2


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_manual_page_is_set_without_a_warning():
    page = ROOT / "docs" / "reference" / "regraft.1"
    ran = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", "-ww", page], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "EXIT STATUS" in ran.stdout

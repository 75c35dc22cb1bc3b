"""What other tools read of this repository: the GitHub action, pre-commit hooks, the Dockerfile, the manual page."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.packaging.compare_wheel import on_disk
from tests.running import ABF, done, write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def action(tmp_path):
    """Runs what action.yml does once regraft is installed, as a runner would: exit code, output, the job's summary."""
    workspace, temp = tmp_path / "workspace", tmp_path / "temp"
    workspace.mkdir()
    command = temp / "regraft" / "bin" / "regraft"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m regraft "$@"\n')
    command.chmod(0o755)
    document = yaml.safe_load((ROOT / "action.yml").read_text())
    *_, step = document["runs"]["steps"]
    defaults = {f"inputs.{name}": given.get("default") for name, given in document["inputs"].items()}

    def run(recipes, **inputs):
        values = {**defaults, "inputs.recipes": recipes, "runner.temp": str(temp)}
        values |= {f"inputs.{name}": value for name, value in inputs.items()}
        written = {name: temp / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in written.values():
            file.write_text("")
        given = {name: re.sub(r"\$\{\{ (\S+) \}\}", lambda found: values[found[1]], value)
                 for name, value in step["env"].items()}  # fmt: skip
        places = {"GITHUB_ACTION_PATH": ROOT, "GITHUB_WORKSPACE": workspace, "RUNNER_TEMP": temp, **written}
        ran = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=workspace, text=True,
            env={**os.environ, **given, **{name: str(place) for name, place in places.items()}},
            capture_output=True, check=False,
        )  # fmt: skip
        assert written["GITHUB_OUTPUT"].read_text() == f"plans={temp}/plans\n"
        return ran.returncode, ran.stdout, written["GITHUB_STEP_SUMMARY"].read_text()

    return run


def test_the_action_plans_good_recipes_and_annotates_bad_ones(action, tmp_path):
    folder = tmp_path / "workspace" / "recipes"
    folder.mkdir()
    write_recipe(folder / "good one.toml", "demo:tiny", ABF)
    wrong = write_recipe(folder / "wrong, 1.toml", "demo:tiny", {**ABF, "methd": "abf"})
    line = next(number for number, text in enumerate(wrong.read_text().splitlines(), 1) if "methd" in text)
    (folder / "good").mkdir()
    write_recipe(folder / "good" / "one.toml", "demo:tiny", ABF)
    write_recipe(folder / "good-one.toml", "demo:tiny", ABF)
    code, out, summary = action("./recipes/**/*.toml\n")
    assert code == 2
    assert "recipes/good one.toml: ok" in out
    assert out.count(f"::error file=recipes/wrong%2C 1.toml,line={line},col=1::error: ") == 1
    assert "methd" in out
    assert "| `recipes/wrong, 1.toml` | exit code 2 |" in summary
    plans = tmp_path / "temp" / "plans"
    made = sorted(path.relative_to(plans).as_posix() for path in plans.rglob("*.json"))
    assert made == ["recipes/good one.json", "recipes/good-one.json", "recipes/good/one.json"]
    assert all(json.loads((plans / name).read_text())["exact"] is True for name in made)


def test_the_action_checks_alone_and_refuses_what_matches_nothing(action, tmp_path):
    write_recipe(tmp_path / "workspace" / "r.toml", "./not-here", ABF)
    assert action("r.toml", plan="false")[0] == 0
    code, out, _ = action("r.toml")
    assert code == 3
    assert out.startswith("::error file=r.toml::error: ")
    code, out, _ = action("nothing/*.toml", plan="false")
    assert (code, out) == (2, "::error::no recipe is called nothing/*.toml\n")
    assert action("", plan="false")[0] == 2


def test_the_action_takes_any_name_for_a_recipe_and_no_word_for_true(action, tmp_path):
    for name in ("--help.toml", "a|b.toml"):
        write_recipe(tmp_path / "workspace" / name, "./not-here", ABF)
    code, out, summary = action("*.toml", plan="false")
    assert (code, out) == (0, "--help.toml: ok\na|b.toml: ok\n")
    assert "| `a\\|b.toml` | ok |" in summary
    assert action("*.toml")[0] == 3
    code, out, _ = action("*.toml", plan="yes")
    assert (code, out) == (2, "::error::plan is true or false, and not yes\n")


def test_what_the_dockerfile_copies_is_in_its_context_and_makes_the_wheel(tmp_path):
    lines = [line.split()[1:] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    sources = [name for words in lines if not words[0].startswith("--from") for name in words[:-1]]
    ignoring = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignoring[0] == "*"
    assert set(sources) == {line.removeprefix("!") for line in ignoring if line.startswith("!")}
    for name in sources:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / "src" / name)
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tmp_path / "src", check=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.startswith("regraft/")} == on_disk()
    assert any(name.endswith("share/man/man1/regraft.1") for name in names)


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

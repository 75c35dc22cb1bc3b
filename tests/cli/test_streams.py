"""A stdout or stderr that nobody reads, that is full, or that is closed: the command ends with its own exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ABF, done, write_recipe


def shell(line):
    """The exit code of the first command of a pipe, and what reached the terminal; `regraft` is that of this Python."""
    program = f'regraft() {{ {sys.executable} -m regraft "$@"; }}\n{line}\nexit ${{PIPESTATUS[0]}}'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def spoilt(workplace):
    """An output of which one file has changed."""
    done("apply", write_recipe(Path("recipe.toml"), "base", ABF, path="out"), "--no-durable")
    path = Path("out/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))


@pytest.mark.parametrize("environment", ["", "PYTHONUNBUFFERED=1 "])
def test_a_reader_that_has_seen_enough_changes_no_exit_code(spoilt, environment):
    ran = shell(f"{environment}regraft diff base out --json | head -c 1")
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "{", "")
    ran = shell(f"{environment}regraft verify out | true")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: out: 1 fault\n")
    assert ran.stderr.count("\n") == 2
    ran = shell(f"{environment}regraft schema | head -c 1")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "{", "")


def test_a_command_goes_on_when_nobody_reads_what_it_says(workplace):
    """Also of stderr: `--json` tells of its progress there."""
    write_recipe(Path("recipe.toml"), "base", path="out", dtype="bfloat16")
    ran = shell("regraft apply recipe.toml --no-durable --json 2>&1 | true")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert done("verify", "out").code == 0


def test_no_text_is_generated_that_nobody_reads(tmp_path):
    script = tmp_path / "counting.py"
    script.write_text("""
import sys
from regraft.cli import main
from regraft.core import generation

choose, asked = generation.choose, []
generation.choose = lambda *given: asked.append(1) or choose(*given)
try:
    main.run(["generate", "demo:tiny", "And the LORD", "--raw", "--max-new-tokens", "200"])
finally:
    print(len(asked), file=sys.stderr)
""")
    ran = shell(f"{sys.executable} {script} | true")
    assert ran.returncode == 0
    assert 1 <= int(ran.stderr) < 20
    ran = shell(f"{sys.executable} {script} | cat > {tmp_path}/read")
    assert int(ran.stderr) == 200, "a reader that stays gets all"


def test_a_result_that_cannot_be_printed_is_an_error_of_resources(workplace):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    for environment in ("", "PYTHONUNBUFFERED=1 "):
        ran = shell(f"{environment}regraft apply recipe.toml --no-durable --force > /dev/full")
        assert ran.returncode == 4
        assert ran.stderr.startswith("error: stdout: the output cannot be printed: No space left on device\n")
        assert ran.stderr.count("\n") == 2
    assert "no faults" in done("verify", "out").out


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_what_the_terminal_cannot_spell_is_escaped(workplace, encoding):
    """Paths may hold any bytes, and terminals may know few letters; an output that stands is no failure for it."""
    recipe = write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    environment = f"PYTHONIOENCODING={encoding} "
    ran = shell(f"{environment}regraft apply {recipe} --no-durable -o $'\\xff\\xc3\\xa9'")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "wrote \\udcff" in ran.stdout
    ran = shell(f"{environment}regraft verify $'\\xff\\xc3\\xa9' --json")
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["checkpoint"] == "\udcff\xe9"
    ran = shell(f"{environment}regraft schema")
    assert json.loads(ran.stdout) == done("schema").json
    ran = shell(f"{environment}regraft verify \xe9 --json")
    assert json.loads(ran.stderr)["where"] == "\xe9"


def test_closed_streams_take_everything(workplace):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    ran = shell("regraft apply recipe.toml --no-durable >&-")
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = shell("regraft apply recipe.toml 2>&-")
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", ""), "what belongs to stderr goes to no other stream"


def test_a_pipe_of_another_kind_that_breaks_is_an_error():
    code = """
import sys
from regraft.cli import main

def broken():
    raise BrokenPipeError(32, "Broken pipe")

sys.modules["regraft.core.recipe.shipped"].shipped_names = broken
main.run(["recipes"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", f"import regraft.core.recipe.shipped\n{code}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: unexpected BrokenPipeError: ")

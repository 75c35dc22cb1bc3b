"""What all commands share: help, version, usage errors, completion, plain output where nobody looks."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin_host import host_with
from tests.running import ABF, done, regraft, write_recipe


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "regraft", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert done("--version").out == f"regraft {version('regraft')}\n"


def test_help_names_every_command():
    out = done("--help").out
    for name in ("apply", "plan", "check", "inspect", "diff", "report", "verify", "plugins", "recipes", "schema"):
        assert name in out


def test_no_arguments_show_the_help():
    ran = regraft()
    assert ran.code == 2
    assert "Usage: regraft" in ran.out


@pytest.mark.parametrize(
    ("arguments", "where", "words"),
    [
        (["aply"], "regraft", "apply"),
        (["apply"], "regraft apply", "RECIPE"),
        (["apply", "x", "--forse"], "regraft apply", "--force"),
        (["apply", "x", "--threads", "-1"], "regraft apply", "--threads"),
        (["apply", "x", "--threads", "two"], "regraft apply", "--threads"),
        (["recipes", "show"], "regraft recipes show", "NAME"),
    ],
)
def test_usage_errors_look_like_all_others(arguments, where, words):
    ran = regraft(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {where}: ")
    assert words in ran.err
    assert ran.err.endswith(f"  remedy: see `{where} --help`\n")
    ran = regraft(*arguments, "--json")
    assert ran.events[-1]["exit_code"] == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    script = command("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert script.returncode == 0, script.stderr
    assert "_REGRAFT_COMPLETE" in script.stdout


def test_completion_completes():
    ran = command(_REGRAFT_COMPLETE="complete_bash", COMP_WORDS="regraft in", COMP_CWORD="1")
    assert ran.stdout.split() == ["inspect"]
    ran = command(_REGRAFT_COMPLETE="complete_bash", COMP_WORDS="regraft apply --dur", COMP_CWORD="2")
    assert "--durable" in ran.stdout.split()


def on_a_terminal(*arguments, **environment):
    """What `regraft` prints where stdout and stderr are a terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "regraft", *arguments],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    )
    os.close(child)
    out = b""
    while True:
        try:
            piece = os.read(parent, 4096)
        except OSError:
            break
        if not piece:
            break
        out += piece
    os.close(parent)
    assert process.wait() == 0, out.decode()
    return out.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*[34][0-7]m")


def test_colours_only_on_a_terminal_and_not_with_no_color(workplace, monkeypatch):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert COLOUR.search(on_a_terminal("--help"))
    assert not COLOUR.search(on_a_terminal("--help", NO_COLOR="1"))
    assert "\x1b" not in command("--help").stdout
    assert not COLOUR.search(on_a_terminal("apply", "recipe.toml", NO_COLOR="1"))


@pytest.mark.parametrize("words", ["cache path", "plugins list", "recipes list", "recipes show quickstart"])
def test_json_before_a_subcommand_holds_for_it(words):
    group, *rest = words.split()
    assert done(group, "--json", *rest).json == done(group, *rest, "--json").json


def test_no_bar_where_stderr_is_no_terminal(workplace):
    write_recipe(Path("recipe.toml"), "base", path="out", dtype="bfloat16")
    ran = command("apply", "recipe.toml")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout


def test_a_plugin_s_commands(monkeypatch):
    """Found by name, listed in the help where strangers are installed, and never in the place of ours."""

    def commands(app):
        @app.command()
        def hello():
            """Greets."""
            print("hello from a plugin")

        @app.command()
        def apply():
            print("not ours")

    monkeypatch.setattr("regraft.core.host.host", lambda: host_with(regraft_commands=commands))
    assert done("hello").out == "hello from a plugin\n"
    assert "RECIPE" in done("apply", "--help").out
    monkeypatch.setattr("regraft.core.host.third_party_installed", lambda: False)
    assert "Greets." not in done("--help").out
    monkeypatch.setattr("regraft.core.host.third_party_installed", lambda: True)
    assert "Greets." in done("--help").out


def test_rust_code_that_gives_up_is_an_error_like_any_other(monkeypatch):
    class PanicException(BaseException):
        pass

    def panic():
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("regraft.core.recipe.shipped.shipped_names", panic)
    ran = regraft("recipes")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: unexpected PanicException: called `Option")

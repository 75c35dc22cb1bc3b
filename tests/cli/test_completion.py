"""What shells are offered, in the protocol that typer's completion scripts speak."""

import os
import subprocess
import sys

import pytest


def offered(*words):
    """What bash is offered for the last word."""
    environment = {
        **os.environ,
        "_REGRAFT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("regraft", *words)),
        "COMP_CWORD": str(len(words)),
    }
    program = "import sys; sys.argv[0] = 'regraft'; from regraft.cli.main import run; run([])"
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("ap",), {"apply"}),
        (("apply", "lo"), {"lofit", "long-context"}),
        (("plan", "quickst"), {"quickstart"}),
        (("apply", "lofit", "--no-d"), {"--no-durable"}),
    ],
)
def test_commands_options_and_shipped_recipes(words, expected):
    assert set(offered(*words)) == expected


def test_a_path_is_left_to_the_shell():
    assert offered("apply", "./") == []

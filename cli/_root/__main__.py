"""`python -m regraft`: the same as the `regraft` command."""

from regraft.cli.main import run

run()

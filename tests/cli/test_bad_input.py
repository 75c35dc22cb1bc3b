"""Every kind of bad input: the documented exit code, one message, no traceback, and nothing written.

The faults are in `bad_*.py`, the messages in `snapshots/`; read the messages when they change.
"""

import pytest

from tests.cli import bad_checkpoints, bad_options, bad_outputs, bad_recipes  # noqa: F401 - they register their cases
from tests.cli.faults import CASES, failed
from tests.cli.snapshots import FOLDER, check_snapshot
from tests.running import regraft, tree


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, workplace):
    arrange, code, arguments = CASES[name]
    arrange()
    before = tree(workplace)
    ran = regraft(*arguments)
    failed(ran, code)
    assert tree(workplace) == before
    if code != 2:
        assert "\n  remedy: " in ran.err
    check_snapshot(name, ran.err, workplace)


def test_the_same_error_as_json(workplace):
    """One line on stderr with the same facts."""
    ran = regraft("apply", "nope.toml", "--json")
    (error,) = ran.events
    assert (error["schema"], error["exit_code"], ran.code) == (1, 2, 2)
    assert error["problems"][0]["file"] == "nope.toml"
    (workplace / "base" / "config.json").unlink()
    ran = regraft("inspect", "base", "--json")
    (error,) = ran.events
    assert (error["error"], error["exit_code"], error["where"], ran.out) == ("InputError", 3, "base", "")
    assert {"message", "expected", "remedy"} <= set(error)


def test_a_tool_fault_is_one_line_and_shows_its_traceback_on_request(workplace, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("regraft.core.inspect.describe", broken)
    ran = regraft("inspect", "base")
    assert ran.code == 1
    assert "ZeroDivisionError: of ours" in ran.err
    assert "Traceback" not in ran.err
    assert "--traceback" in ran.err
    with pytest.raises(ZeroDivisionError):
        regraft("inspect", "base", "--traceback")


def test_no_snapshot_is_left_over():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)

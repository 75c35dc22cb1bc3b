"""The work folder: what a killed run leaves, what steps keep in it, and that two runs do not share it."""

import errno
import fcntl
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from regraft.core.errors import ResourceError, UsageError
from regraft.core.workspace import check_target, workspace
from tests.core.committing import NEW, OLD, write
from tests.helpers import contents, fill, names, raising

# What a killed run leaves


def test_the_remains_of_a_killed_run_are_cleared_away(tmp_path, target):
    kept = fill(tmp_path / "kept", OLD)
    folder = target.parent / ".model.regraft"
    fill(folder, {"output/half.bin": "x", "cache/step/x": "x", "stray": "x"})
    (folder / "link").symlink_to(kept)
    with workspace(target, force=True) as space:
        assert names(space.folder) == ["cache", "output"]
        assert names(space.output) == []
    assert contents(kept) == OLD


def test_a_target_that_a_killed_run_was_replacing_comes_back(target):
    fill(target.parent / ".model.regraft", {"replaced/old.txt": "old", "output/new.txt": "new"})
    with workspace(target, force=True) as space:
        assert contents(target) == OLD
        assert space.replaces
    assert contents(target) == OLD


def test_a_target_that_was_replaced_before_the_kill_stays_new(target):
    fill(target, NEW)
    fill(target.parent / ".model.regraft", {"replaced/old.txt": "old"})
    with workspace(target, force=True):
        assert contents(target) == NEW
    assert names(target.parent) == ["model"]


def test_a_target_that_a_killed_run_was_replacing_counts_as_full(target):
    fill(target.parent / ".model.regraft", {"replaced/old.txt": "old"})
    with pytest.raises(UsageError, match="not empty"):
        check_target(target, force=False)
    check_target(target, force=True)


# What steps keep


def save_state(space, step="tune"):
    fill(space.state_of(step), {"step-2/state.json": "{}"})


def save_and(target, then, save=save_state):
    with workspace(target, force=True) as space:
        fill(space.output, NEW)
        save(space)
        then(space)


def break_off(target, **options):
    with pytest.raises(ZeroDivisionError):
        save_and(target, lambda space: 1 / 0, **options)


def test_state_outlives_a_run_that_fails_and_goes_with_the_one_that_succeeds(target):
    break_off(target)
    assert names(target.parent) == [".model.regraft"]
    assert contents(target.parent / ".model.regraft") == {"state/tune/step-2/state.json": "{}"}
    with workspace(target, force=True) as space:
        assert contents(space.state_of("tune")) == {"step-2/state.json": "{}"}
        assert names(space.output) == []
        fill(space.output, NEW)
        space.commit(durable=False)
    assert contents(target) == NEW
    assert names(target.parent) == ["model"]


def test_state_outlives_a_commit_that_fails(target):
    with pytest.raises(ResourceError, match="put in place"):
        save_and(target, lambda space: (fill(target, OLD), space.commit(durable=False)))
    assert contents(target.parent / ".model.regraft") == {"state/tune/step-2/state.json": "{}"}


def test_a_killed_run_s_state_is_taken_over_or_forgotten(target):
    fill(target.parent / ".model.regraft", {"state/tune/x": "x", "output/half.bin": "x"})
    with workspace(target, force=True) as space:
        assert space.keeps_state
    with workspace(target, force=True, restart=True) as space:
        assert not space.keeps_state
        assert names(space.folder) == ["cache", "output"]
    assert names(target.parent) == []


def test_empty_folders_are_no_state(target):
    break_off(target, save=lambda space: space.state_of("tune").mkdir(parents=True))
    assert not target.parent.exists()


def test_a_link_in_place_of_the_state_is_not_followed(tmp_path, target):
    precious = fill(tmp_path / "precious", OLD)
    folder = target.parent / ".model.regraft"
    folder.mkdir(parents=True)
    (folder / "state").symlink_to(precious)
    with workspace(target, force=True) as space:
        assert not space.keeps_state
        assert names(space.folder) == ["cache", "output"]
    assert contents(precious) == OLD


def test_every_step_has_a_folder_of_its_own_whatever_its_id(target):
    ids = ["tune", "tune-2", "..", "a/b", "a\0b", "", ".hidden", "_x", "x" * 300, "x" * 301, "tune ", "é"]
    with workspace(target, force=True) as space:
        folders = [space.state_of(step) for step in ids]
        for folder in folders:
            assert folder.parent == space.state
            folder.mkdir(parents=True)
        assert folders[0].name == "tune"
        assert len(names(space.state)) == len(ids)


# Two runs at once


HOLD = """
    import sys
    from pathlib import Path
    from regraft.core.workspace import workspace

    with workspace(Path(sys.argv[1]), force=True) as space:
        (space.output / "half.bin").write_text("x")
        print("held", flush=True)
        sys.stdin.readline()
        if sys.argv[2] == "commit":
            space.commit(durable=False)
"""


def hold(target, end="leave"):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(target), end]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_two_runs_cannot_write_one_target_at_once(target):
    process = hold(target, "commit")
    try:
        with pytest.raises(ResourceError, match="another run is writing this target") as caught, workspace(target):
            pytest.fail("it was entered")
        assert caught.value.where == str(target)
    finally:
        process.communicate("\n", timeout=30)
    assert contents(target) == {"half.bin": "x"}
    write(target)
    assert contents(target) == NEW


def test_a_run_that_looked_before_another_filled_the_target_replaces_nothing(target):
    check_target(target, force=False)
    write(target)
    with pytest.raises(UsageError, match="the target is not empty"), workspace(target):
        pytest.fail("it was entered")
    assert contents(target) == NEW
    assert names(target.parent) == ["model"]


def test_a_killed_run_blocks_nobody(target):
    process = hold(target)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert (target.parent / ".model.regraft" / "output" / "half.bin").exists()
    assert not target.exists()
    write(target)
    assert contents(target) == NEW
    assert names(target.parent) == ["model"]


def test_two_targets_side_by_side_do_not_disturb_each_other(tmp_path):
    with workspace(tmp_path / "one") as one, workspace(tmp_path / "two") as two:
        fill(one.output, OLD)
        fill(two.output, NEW)
        two.commit(durable=False)
        one.commit(durable=False)
    assert contents(tmp_path / "one") == OLD
    assert contents(tmp_path / "two") == NEW


def test_a_work_folder_that_is_removed_while_it_is_locked_is_not_used(target, monkeypatch):
    lock = fcntl.flock

    def remove_and_lock(descriptor, how):
        shutil.rmtree(target.parent / ".model.regraft")
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with pytest.raises(ResourceError, match="another run"), workspace(target, force=True):
        pytest.fail("it was entered")


# Places that cannot be used


def test_a_link_in_place_of_the_work_folder_is_not_followed(tmp_path, target):
    precious = fill(tmp_path / "precious", OLD)
    target.parent.mkdir()
    (target.parent / ".model.regraft").symlink_to(precious)
    with pytest.raises(ResourceError, match="work folder cannot be made"), workspace(target, force=True):
        pytest.fail("it was entered")
    assert contents(precious) == OLD


def test_a_file_in_place_of_the_work_folder_stays(target):
    fill(target.parent, {".model.regraft": "a file"})
    with pytest.raises(ResourceError, match="work folder cannot be made"), workspace(target, force=True):
        pytest.fail("it was entered")
    assert contents(target.parent) == {".model.regraft": "a file"}


def test_a_work_folder_that_cannot_be_cleared_is_a_resource_error(target, monkeypatch):
    fill(target.parent / ".model.regraft", {"output/half.bin": "x"})
    remove = shutil.rmtree

    def fail(path, ignore_errors=False):
        return remove(path, ignore_errors=True) if ignore_errors else raising(errno.EACCES)()

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(ResourceError, match="Permission denied"), workspace(target, force=True):
        pytest.fail("it was entered")


def test_folders_made_in_vain_are_removed(tmp_path):
    target = tmp_path / "a" / "b" / ("x" * 250)
    with pytest.raises(ResourceError, match="File name too long"), workspace(target, force=True):
        pytest.fail("it was entered")
    assert names(tmp_path) == []

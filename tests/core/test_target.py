"""Which targets are accepted, and which are refused before anything is written."""

import errno
import os
from pathlib import Path

import pytest

from regraft.core.errors import ResourceError, UsageError
from regraft.core.workspace import check_target, workspace
from tests.helpers import contents, fill, names, raising

OLD = {"old.txt": "old"}


def enter(target):
    with workspace(target):
        pytest.fail("it was entered")


@pytest.mark.parametrize("name", ["a\0b", "loop/model"])
def test_what_is_no_path_is_a_usage_error(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="not a path") as caught:
        check_target(tmp_path / name, force=True)
    assert "\0" not in str(caught.value)
    with pytest.raises(UsageError, match="not a path"):
        enter(tmp_path / name)


def test_new_empty_and_forced_targets_are_accepted(tmp_path):
    check_target(tmp_path / "new", force=False)
    check_target(tmp_path / "deep" / "new", force=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", force=False)
    check_target(fill(tmp_path / "full", {**OLD, "config.json": "{}"}), force=True)
    assert names(tmp_path) == ["empty", "full"]


def test_force_replaces_checkpoints_only(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint") as caught:
        check_target(fill(tmp_path / "home", {"diary.txt": "dear diary"}), force=True)
    assert "config.json" in caught.value.expected


def test_a_full_target_needs_force(tmp_path):
    with pytest.raises(UsageError, match="not empty") as caught:
        check_target(fill(tmp_path / "full", OLD), force=False)
    assert "--force" in caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("force", [True, False])
def test_a_file_is_no_target(tmp_path, force):
    fill(tmp_path, {"file": "x"})
    with pytest.raises(UsageError, match="is a file"):
        check_target(tmp_path / "file", force=force)
    with pytest.raises(UsageError, match="inside a file"):
        check_target(tmp_path / "file" / "model", force=force)
    with pytest.raises(UsageError, match="root"):
        check_target(Path("/"), force=force)


def test_a_target_equal_to_inside_or_around_an_input_is_refused(tmp_path):
    base = fill(tmp_path / "models" / "base", OLD)
    link = tmp_path / "link"
    link.symlink_to(base)
    for target, words in {
        base: "is an input",
        link: "is an input",
        tmp_path / "models" / "x" / ".." / "base": "is an input",
        base / "out": "inside an input",
        link / "deep" / "out": "inside an input",
        tmp_path / "models": "inside the target",
    }.items():
        for inputs in ((base,), (tmp_path / "other", base), (link,)):
            with pytest.raises(UsageError, match=words):
                check_target(target, force=True, inputs=inputs)
    assert contents(base) == OLD


def test_a_file_that_is_read_may_not_stand_in_the_target_but_beside_it(tmp_path):
    file = fill(tmp_path / "m", {"base.gguf": "x"}) / "base.gguf"
    with pytest.raises(UsageError, match="inside the target"):
        check_target(tmp_path / "m", force=True, inputs=(file,))
    with pytest.raises(UsageError, match="is an input"):
        check_target(file, force=True, inputs=(file,))
    check_target(tmp_path / "m" / "out", force=False, inputs=(file,))
    check_target(tmp_path / "m2", force=False, inputs=(tmp_path / "m",))


def test_a_read_only_folder_is_a_resource_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ResourceError, match="cannot be written") as caught:
        check_target(tmp_path / "deep" / "model", force=False)
    assert str(tmp_path) in caught.value.found
    assert caught.value.exit_code == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_really_read_only_is_a_resource_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ResourceError):
            check_target(tmp_path / "model", force=False)
        with pytest.raises(ResourceError), workspace(tmp_path / "model"):
            pytest.fail("it was entered")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_cannot_be_looked_at_is_a_resource_error(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(Path, "iterdir", raising(errno.EACCES))
    with pytest.raises(ResourceError, match="Permission denied"):
        check_target(tmp_path / "model", force=False)

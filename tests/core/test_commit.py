"""The commit: a target is what it was, or complete, and what comes in the way meanwhile is not replaced."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from regraft.core import workspace as module
from regraft.core.errors import ResourceError
from regraft.core.workspace import workspace
from tests.core.committing import NEW, OLD, write
from tests.helpers import contents, fill, names, raising


def fail_in(target, error):
    """A run into `target` that fails half way."""
    with workspace(target, force=True) as space:
        fill(space.output, NEW)
        raise error


def commit_after(target, prepare):
    """A run into `target`, before whose commit something happens."""
    with workspace(target, force=True) as space:
        fill(space.output, NEW)
        prepare()
        space.commit(durable=False)


@pytest.mark.parametrize("durable", [True, False])
def test_a_target_appears_complete_and_the_work_folder_goes(target, durable):
    with workspace(target, force=True) as space:
        assert space.output.is_dir()
        assert space.cache.is_dir()
        fill(space.output, NEW)
        fill(space.cache, OLD)
        assert not target.exists()
        space.commit(durable=durable)
        assert contents(target) == NEW
    assert contents(target) == NEW
    assert names(target.parent) == ["model"]


def test_a_run_that_fails_leaves_nothing_not_even_folders(tmp_path, target):
    with pytest.raises(ZeroDivisionError):
        fail_in(target, ZeroDivisionError())
    assert names(tmp_path) == []


def test_a_run_that_fails_keeps_folders_that_were_there(target):
    target.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        fail_in(target, KeyboardInterrupt())
    assert names(target.parent) == []


def test_an_empty_target_is_filled(target):
    target.mkdir(parents=True)
    write(target)
    assert contents(target) == NEW


def test_a_full_target_is_replaced_whole(target):
    fill(target, OLD)
    write(target)
    assert contents(target) == NEW
    assert names(target.parent) == ["model"]


def test_a_full_target_stays_if_the_run_fails(target):
    fill(target, OLD)
    with pytest.raises(ZeroDivisionError):
        fail_in(target, ZeroDivisionError())
    assert contents(target) == OLD


def test_a_target_is_never_absent_while_it_is_replaced(target):
    fill(target, OLD)
    stop, gaps, looks = threading.Event(), [], []

    def watch():
        while not stop.is_set():
            looks.append(1)
            if not target.is_dir():
                gaps.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(50):
        write(target)
    stop.set()
    watcher.join()
    assert len(looks) > 50
    assert not gaps


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    real = fill(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to(real)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(real) == NEW


def test_a_relative_target_does_not_move_with_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with workspace(Path("model"), force=True) as space:
        fill(space.output, NEW)
        monkeypatch.chdir(tmp_path / "b")
        space.commit(durable=False)
    assert contents(tmp_path / "a" / "model") == NEW
    assert names(tmp_path / "b") == []


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_commit_flushes_every_file_and_folder_before_the_rename(target, monkeypatch, durable):
    flushed, real = [], os.fsync

    def fsync(descriptor):
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(target, durable=durable)
    output = target.parent / ".model.regraft" / "output"
    before = [output / "new.txt", output / "sub" / "new.txt", output / "sub", output]
    assert sorted(flushed[:-1]) == (sorted(map(str, before)) if durable else [])
    assert flushed[-1:] == ([str(target.parent)] if durable else [])


def test_a_disk_that_fails_while_flushing_leaves_no_target(target, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(errno.EIO))
    with pytest.raises(ResourceError, match="Input/output error"):
        write(target, durable=True)
    assert not target.exists()


def test_a_target_that_somebody_fills_meanwhile_is_not_replaced(target):
    with pytest.raises(ResourceError, match="cannot be put in place") as caught:
        commit_after(target, lambda: fill(target, OLD))
    assert "meanwhile" in caught.value.remedy
    assert contents(target) == OLD
    assert names(target.parent) == ["model"]


def test_a_file_that_comes_in_the_way_is_not_replaced(target):
    with pytest.raises(ResourceError, match="cannot be put in place"):
        commit_after(target, lambda: target.write_text("a file"))
    assert target.read_text() == "a file"


def test_a_target_that_vanishes_meanwhile_is_written(target):
    fill(target, OLD)
    commit_after(target, lambda: shutil.rmtree(target))
    assert contents(target) == NEW


# Where the kernel cannot exchange


class NoExchange:
    """A C library without renameat2, or whose file system refuses it."""

    def __init__(self, code):
        if code is not None:
            self.renameat2 = lambda *arguments: -1


@pytest.fixture(params=[None, errno.ENOSYS, errno.EINVAL])
def no_exchange(request, monkeypatch):
    monkeypatch.setattr(module.ctypes, "CDLL", lambda *arguments, **options: NoExchange(request.param))
    monkeypatch.setattr(module.ctypes, "get_errno", lambda: request.param)


@pytest.mark.usefixtures("no_exchange")
def test_two_renames_do_it_too(target):
    fill(target, OLD)
    write(target)
    assert contents(target) == NEW
    assert names(target.parent) == ["model"]


@pytest.mark.usefixtures("no_exchange")
def test_a_second_rename_that_fails_brings_the_old_target_back(target, monkeypatch):
    fill(target, OLD)
    rename = Path.rename

    def fail_for_output(path, to):
        return raising(errno.EIO)() if path.name == "output" else rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_for_output)
    with pytest.raises(ResourceError, match="cannot be put in place"):
        write(target)
    assert contents(target) == OLD
    assert names(target.parent) == ["model"]


@pytest.mark.usefixtures("no_exchange")
def test_an_old_target_that_cannot_come_back_is_kept_for_the_next_run(target, monkeypatch):
    fill(target, OLD)
    rename = Path.rename

    def fail_for_all_but_the_first(path, to):
        return rename(path, to) if path == target else raising(errno.EIO)()

    monkeypatch.setattr(Path, "rename", fail_for_all_but_the_first)
    with pytest.raises(ResourceError):
        write(target)
    assert not target.exists()
    monkeypatch.undo()
    with workspace(target, force=True):
        assert contents(target) == OLD
    assert contents(target) == OLD


def test_another_refusal_of_the_kernel_is_a_resource_error(target, monkeypatch):
    fill(target, OLD)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda *arguments, **options: NoExchange(errno.EPERM))
    monkeypatch.setattr(module.ctypes, "get_errno", lambda: errno.EPERM)
    with pytest.raises(ResourceError, match="cannot be put in place"):
        write(target)
    assert contents(target) == OLD
